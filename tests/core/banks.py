"""A bank of experts, read in each way that a model may."""

import torch
import torch.nn.functional as F
from torch import nn

E, OUT, IN = 4, 16, 8


class Bank(nn.Module):
    """Experts, `(E, out, in)`, read in one of many ways."""

    def __init__(self, form, shape=(E, OUT, IN), dtype=torch.float64):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.form = form

    def forward(self, *inputs):
        return self.form(self.experts, *inputs)


PICKED = torch.tensor([2, 0, 0])
MASK = torch.tensor([True, False, True, False])
FORMS = {
    "bmm": lambda w, x: torch.bmm(x, w.transpose(1, 2)),
    "bmm of negative dims": lambda w, x: x.bmm(torch.transpose(w, -1, -2)),
    "bmm on the left": lambda w, x: torch.bmm(w, x.mT),
    "matmul": lambda w, x: x @ w.mT,
    "matmul on the left": lambda w, x: w @ x.mT,
    "matmul that broadcasts": lambda w, x: x[0] @ w.mT,
    "vector on the right": lambda w, x: w @ x[0, 0],
    "vector on the left": lambda w, x: x[0, 0] @ w.mT,
    "vector by torch.matmul": lambda w, x: torch.matmul(w, x[0, 0]),
    "einsum": lambda w, x: torch.einsum("eti,eoi->eto", x, w),
    "einsum, implicit": lambda w, x: torch.einsum("eti,eoi", x, w),
    "einsum of all tokens": lambda w, x: torch.einsum("ti, eoi -> teo", x[0], w),
    "einsum over outputs": lambda w, x: torch.einsum("eto,eoi->eti", torch.cat([x, x], -1), w),
    "einsum of three": lambda w, x: torch.einsum("et,eti,eoi->to", x[..., 0], x, w),
    "einsum of a list": lambda w, x: torch.einsum("eti,eoi->eto", [x, w]),
    "loop": lambda w, x: torch.stack([F.linear(x[i], w[i]) for i in range(E)]),
    "loop by @": lambda w, x: torch.stack([x[i] @ w[torch.tensor(i)].T for i in range(E)]),
    "iteration": lambda w, x: torch.stack([one @ v.t() for one, v in zip(x, w, strict=True)]),
    "unbind": lambda w, x: torch.stack([a @ v.t() for a, v in zip(x, w.unbind(), strict=True)]),
    "gather": lambda w, x: torch.bmm(w[PICKED], x[:3].mT),
    "slice": lambda w, x: x[1:3] @ w[1:3].mT,
    "mask": lambda w, x: x[MASK] @ w[MASK].mT,
}

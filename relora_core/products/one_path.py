"""The linear layer in one path: over V = W + s B A, which is kept beside W.

Shapes: T tokens, n inputs, m outputs, r rank. x (T, n), V (m, n), A (r, n), B (m, r), b (m).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core.products.two_paths import scaled


class OnePathLinear(torch.autograd.Function):
    """y = x Vᵀ + b, where V and B are stored side by side in one matrix [V | B].

    With g the gradient of y, one product gives both dx and h: [dx | h] = g [V | B]. Then:

        dx = g V        dA = s hᵀ x        dB = s gᵀ (x Aᵀ)        db = Σ g

    V was computed from A and B, so first and second derivatives of y flow through A and B.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, both: Tensor, A: Tensor, B: Tensor, b: Tensor | None, s: float
    ) -> Tensor:
        """Return y."""
        ctx.save_for_backward(x, both, A, B)
        ctx.s = s
        return F.linear(x, both[:, : A.shape[1]], b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and b."""
        x, both, A, B = ctx.saved_tensors
        need_x, _, need_A, need_B, need_b, _ = ctx.needs_input_grad
        (g,), (r, n) = grads, A.shape
        dx = dA = dB = None
        if torch.is_grad_enabled():
            h = g @ B
            dx = g @ following(both[:, :n], ctx.s * (B @ A))
        elif need_x and need_A:
            dx, h = (g @ both[:, : n + r]).split((n, r), dim=1)
        elif need_x:
            dx = g @ both[:, :n]
        elif need_A:
            h = g @ B
        if need_A:
            dA = scaled(h.t() @ x, ctx.s)
        if need_B:
            dB = scaled(g.t() @ (x @ A.t()), ctx.s)
        db = g.sum(0) if need_b else None
        return dx if need_x else None, None, dA, dB, db, None


def following(value: Tensor, part: Tensor) -> Tensor:
    """Return `value`, which already includes `part`, with the derivatives of `part`."""
    return value + (part - part.detach()).to(value.dtype)

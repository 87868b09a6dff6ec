"""The two-path linear layer: W and its low-rank update are applied side by side.

Shapes: T tokens, n inputs, m outputs, r rank. x (T, n), W (m, n), A (r, n), B (m, r), b (m).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


class _TwoPathLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ, and u = x Aᵀ, which backward needs again.

    With g the gradient of y and h = s g B, shared by two of them:

        dx = g W + h A        dA = hᵀ x        dB = s gᵀ u        db = Σ g

    No (m, n) gradient exists unless W itself asks for one, and y and dx are the only tensors of
    their sizes. u is an output, rather than hidden in `ctx`, so that a second derivative finds
    its way through it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None, s: float
    ) -> tuple[Tensor, Tensor]:
        u = x @ A.t()
        y = x @ W.t() if b is None else torch.addmm(b, x, W.t())
        ctx.save_for_backward(x, W, A, B, u)
        ctx.set_materialize_grads(False)
        ctx.s = s
        return y.addmm_(u, B.t(), alpha=s), u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, A, B, u = ctx.saved_tensors
        need_x, need_W, need_A, need_B, need_b, _ = ctx.needs_input_grad
        g, gu = grads
        dx = dW = dA = dB = db = None
        if g is not None:
            if need_x or need_A:
                h = ctx.s * (g @ B)
                gu = h if gu is None else gu + h
            if need_x:
                dx = g @ W
            if need_W:
                dW = g.t() @ x
            if need_B:
                dB = ctx.s * (g.t() @ u)
            if need_b:
                db = g.sum(0)
        if gu is not None:
            if need_x:
                dx = gu @ A if dx is None else dx.addmm_(gu, A)
            if need_A:
                dA = gu.t() @ x
        return dx, dW, dA, dB, db, None


def autocasts(device: str) -> bool:
    """Whether autocast is on for this kind of device (the meta device has none)."""
    return device != "meta" and torch.is_autocast_enabled(device)


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work.

    They see through plain operations: vmap has no rule for a write in place, and a `jvp` of the
    Function's own would keep `torch.compile` out.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def low_rank_linear(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Apply `F.linear(input, weight + scale * lora_B @ lora_A, bias)` without forming the sum.

    The factors take part in `weight`'s dtype; under autocast everything takes part in autocast's,
    as it does in `F.linear`. Between forward and backward the input is kept, and T r numbers more;
    with dropout of the low-rank path's input, instead of the input what dropout made of it, and
    its mask.
    """
    if autocasts(input.device.type) and torch.float64 not in (input.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    lora_A, lora_B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    if dropout or transformed():
        u = F.linear(F.dropout(input, dropout), lora_A)
        return F.linear(input, weight, bias) + scale * F.linear(u, lora_B)
    y, _ = _TwoPathLinear.apply(  # type: ignore[no-untyped-call]
        input.reshape(-1, input.shape[-1]), weight, lora_A, lora_B, bias, scale
    )
    output: Tensor = y.reshape(*input.shape[:-1], weight.shape[0])
    return output

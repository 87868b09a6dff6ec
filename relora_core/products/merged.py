"""The linear layer with its weight merged on the fly; the gradients of A and B stay factored.

Shapes: T tokens, n inputs, m outputs, r rank. x (T, n), W (m, n), A (r, n), B (m, r), b (m).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core.products.two_paths import scaled


class MergedLinear(torch.autograd.Function):
    """y = x Vᵀ + b, where V = W + s B A is formed in forward and again in backward.

    With g the gradient of y:

        dx = g V        dA = s (g B)ᵀ x        dB = s gᵀ (x Aᵀ)        db = Σ g

    No (m, n) gradient is formed unless W requires one, and V is freed after each use. V has the
    same bits as W after a merge, so a merge leaves y bitwise unchanged.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None, s: float
    ) -> Tensor:
        """Return y."""
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return F.linear(x, _sum(W, A, B, s), b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W, A, B and b."""
        x, W, A, B = ctx.saved_tensors
        need_x, need_W, need_A, need_B, need_b, _ = ctx.needs_input_grad
        (g,) = grads
        dx = g @ _sum(W, A, B, ctx.s) if need_x else None
        dW = g.t() @ x if need_W else None
        dA = scaled((g @ B).t() @ x, ctx.s) if need_A else None
        dB = scaled(g.t() @ (x @ A.t()), ctx.s) if need_B else None
        db = g.sum(0) if need_b else None
        return dx, dW, dA, dB, db, None


def _sum(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return W + s B A, computed with the same operation as a merge where possible."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        # Inductor of torch 2.13 drops alpha when adding a product, and `out=` has no derivative.
        return torch.addmm(W, B, A, alpha=s)
    V = B @ A
    return torch.add(W, V, alpha=s, out=V)

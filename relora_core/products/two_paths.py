"""The linear layer in two paths: W and its low-rank update are applied side by side.

Shapes: T tokens, n inputs, m outputs, r rank. x (T, n), W (m, n), A (r, n), B (m, r), b (m).
"""

from typing import Any

import torch
from torch import Tensor

from relora_core.products.thin import sum_of_products


class TwoPathLinear(torch.autograd.Function):
    """y = s u Bᵀ + x Wᵀ + b with u = x Aᵀ, which is kept for backward.

    With g the gradient of y, and h = g B, which dx and dA share:

        dx = s h A + g W        dA = s hᵀ x        dB = s gᵀ u        db = Σ g

    No (m, n) gradient is formed unless W requires one, and y and dx are the only tensors of their
    sizes. For second derivatives, which flow through u, backward forms u again. If u were an output
    instead, the saved tensors would form a reference cycle, which torch 2.8 leaves to Python's
    garbage collector when a recomputed forward stops early.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None, s: float
    ) -> Tensor:
        """Return y."""
        u = x @ A.t()
        ctx.save_for_backward(x, W, A, B, u)
        ctx.s = s
        return sum_of_products(u, B.t(), x, W.t(), s, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W, A, B and b."""
        x, W, A, B, u = ctx.saved_tensors
        need_x, need_W, need_A, need_B, need_b, _ = ctx.needs_input_grad
        (g,) = grads
        if torch.is_grad_enabled():
            u = x @ A.t()
        dx = dA = None
        if need_x or need_A:
            h = g @ B
            dx = sum_of_products(h, A, g, W, ctx.s) if need_x else None
            dA = scaled(h.t() @ x, ctx.s) if need_A else None
        dW = g.t() @ x if need_W else None
        dB = scaled(g.t() @ u, ctx.s) if need_B else None
        db = g.sum(0) if need_b else None
        return dx, dW, dA, dB, db, None


def scaled(gradient: Tensor, s: float) -> Tensor:
    """Return s times a factor's gradient, without a pass over it where s is 1."""
    return gradient if s == 1 else s * gradient

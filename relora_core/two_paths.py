"""The linear layer in two paths: W and its low-rank update are applied side by side.

Shapes: T tokens, n inputs, m outputs, r rank. x (T, n), W (m, n), A (r, n), B (m, r), b (m).
"""

from typing import Any

import torch
from torch import Tensor


class TwoPathLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s u Bᵀ with u = x Aᵀ, which is kept for backward.

    With g the gradient of y and h = s g B, shared by two of them:

        dx = g W + h A        dA = hᵀ x        dB = s gᵀ u        db = Σ g

    No (m, n) gradient exists unless W itself asks for one, and y and dx are the only tensors of
    their sizes. For a second derivative, which has to find its way through u, it is formed again;
    were it an output, what is kept would refer to itself, and torch 2.8 leaves that to Python's
    collector where a recomputed forward stops early.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None, s: float
    ) -> Tensor:
        """Return y."""
        u = x @ A.t()
        y = x @ W.t() if b is None else torch.addmm(b, x, W.t())
        ctx.save_for_backward(x, W, A, B, u)
        ctx.s = s
        return y.addmm_(u, B.t(), alpha=s)

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
            h = ctx.s * (g @ B)
            dx = (g @ W).addmm_(h, A) if need_x else None
            dA = h.t() @ x if need_A else None
        dW = g.t() @ x if need_W else None
        dB = ctx.s * (g.t() @ u) if need_B else None
        db = g.sum(0) if need_b else None
        return dx, dW, dA, dB, db, None

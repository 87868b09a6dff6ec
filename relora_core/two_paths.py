"""The linear layer in two paths: W and its low-rank update are applied side by side.

Shapes: T tokens, n inputs, m outputs, r rank. x (T, n), W (m, n), A (r, n), B (m, r), b (m).
"""

from typing import Any

import torch
from torch import Tensor


class TwoPathLinear(torch.autograd.Function):
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
        """Return y and u."""
        u = x @ A.t()
        y = x @ W.t() if b is None else torch.addmm(b, x, W.t())
        ctx.save_for_backward(x, W, A, B, u)
        ctx.set_materialize_grads(False)
        ctx.s = s
        return y.addmm_(u, B.t(), alpha=s), u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W, A, B and b."""
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

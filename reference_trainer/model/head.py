"""The output head: logits in rows that are aligned for a GPU, whatever the vocabulary size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WORD = 8  # entries of 16 bits: a GPU's products are fast if rows begin at multiples of this


class Head(nn.Linear):
    """x Wᵀ, without a bias.

    If the vocabulary size is not a multiple of 8, each row of logits is followed by a few unused
    entries. All three products of a training step then read and write aligned rows, because the
    gradient of the logits takes the memory of the logits (`loss.py`).

    Args:
        hidden_size: n.
        vocab_size: m.

    Examples:
        >>> Head(4, 10)(torch.ones(3, 4)).stride()
        (16, 1)
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, n) to (tokens, m); for other shapes, or compiled, as nn.Linear does."""
        if self.out_features % _WORD == 0 or not self._is_plain(x):
            return F.linear(x, self.weight)
        # Torch has no types for `apply`.
        logits: Tensor = _Aligned.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return logits

    def _is_plain(self, x: Tensor) -> bool:
        """Whether no compiler, transform, autocast or parametrization handles this layer."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            return False
        # A parametrized weight may be something other than a Tensor.
        return isinstance(self.weight, Tensor) and x.ndim == 2 and x.dtype == self.weight.dtype


class _Aligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        columns = -(-W.shape[0] // _WORD) * _WORD
        rows = x.new_empty(x.shape[0], columns)[:, : W.shape[0]]
        return torch.mm(x, W.t(), out=rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        (g,) = grads
        need_x, need_W = ctx.needs_input_grad
        return g @ W if need_x else None, g.t() @ x if need_W else None

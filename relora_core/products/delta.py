"""This process's part of the update s B A, and its addition to W."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_core.products.linear import autocasts


@dataclass(frozen=True)
class Delta:
    """A block of W + s B A: some rows and columns of W, those rows of B, those columns of A.

    Args:
        W: the block, in W's own memory; for a bank, some of its matrices.
        B: the block's rows of B, `(rows, rank)`, or `(matrices, rows, rank)`.
        A: the block's columns of A, `(rank, columns)`, or `(matrices, rank, columns)`.
        s: the scale.
    """

    W: Tensor
    B: Tensor
    A: Tensor
    s: float

    def matrices(self) -> "Iterator[Delta]":
        """Iterate over a bank's matrices; a single matrix yields itself."""
        if self.B.ndim == 2:
            yield self
        else:
            for W, B, A in zip(self.W, self.B, self.A, strict=True):
                yield from Delta(W, B, A, self.s).matrices()

    def add_(self, total: Tensor) -> Tensor:
        """Add s B A to `total`, the block's value, in place: in fp32 at least, and round once."""
        for one, update in zip(_matrices(total, self.B.ndim - 2), self.matrices(), strict=True):
            update.prepared(one)()
        return total

    def prepared(self, total: Tensor) -> Callable[[], object]:
        """Return a function that adds s B A to the matrix `total` and allocates no memory."""
        wide = self._wide(total)
        product = self._product(wide)
        if total.dtype == wide and total.is_contiguous():
            return lambda: total.flatten(1).add_(product, alpha=self.s)
        sum = total.to(wide, copy=True).flatten(1).add_(product, alpha=self.s)
        return lambda: total.copy_(sum.view(total.shape))

    def sum_into_(self, total: Tensor) -> Tensor:
        """Set `total`, `(rows, columns)`, to W + s B A, added as in a merge and then rounded."""
        wide = self._wide(self.W)
        return torch.add(self.W.to(wide).flatten(1), self._product(wide), alpha=self.s, out=total)

    def _product(self, wide: torch.dtype) -> Tensor:
        device = self.A.device.type
        with torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            return self.B.to(wide) @ self.A.to(wide)

    def _wide(self, total: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(total.dtype, self.A.dtype), torch.float32)

    def square(self) -> Tensor:
        """Return the squared Frobenius norm of the block's s B A, in fp32 at least.

        It is s² tr((Bᵀ B)(A Aᵀ)), from two r x r products; it is not finite if a factor is not.
        """
        if autocasts(self.A.device.type):
            with torch.autocast(self.A.device.type, enabled=False):
                return self.square()
        wide = torch.promote_types(self.A.dtype, torch.float32)
        A, B = self.A.to(wide), self.B.to(wide)
        return self.s**2 * ((A @ A.mT) * (B.mT @ B)).sum()


def _matrices(bank: Tensor, batch_dims: int) -> Iterator[Tensor]:
    if batch_dims == 0:
        yield bank
    else:
        for one in bank:
            yield from _matrices(one, batch_dims - 1)

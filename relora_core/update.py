"""What a merge adds to W, as far as this process holds W."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_core.linear import autocasts


@dataclass(frozen=True)
class Update:
    """A block of W + s B A: some rows and columns of W, those rows of B, those columns of A.

    Args:
        W: the block, in W's own memory.
        B: its rows of B, `(rows, rank)`.
        A: its columns of A, `(rank, columns)`.
        s: the scale.
    """

    W: Tensor
    B: Tensor
    A: Tensor
    s: float

    def add_(self, total: Tensor) -> Tensor:
        """Add s B A to `total`, the block's value, in place: in fp32 at least, rounded once."""
        wide = self._wide(total)
        sum = total.to(wide).flatten(1)  # its own memory, unless it is narrower or not contiguous
        sum.add_(self._product(wide), alpha=self.s)
        if total.dtype != wide or not total.is_contiguous():
            total.copy_(sum.view(total.shape))
        return total

    def sum_into_(self, total: Tensor) -> Tensor:
        """Set `total`, `(rows, columns)`, to W + s B A: added as a merge does, then rounded."""
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

        It is s² tr((Bᵀ B)(A Aᵀ)), of two r x r products; not finite if a factor is not.
        """
        if autocasts(self.A.device.type):
            with torch.autocast(self.A.device.type, enabled=False):
                return self.square()
        wide = torch.promote_types(self.A.dtype, torch.float32)
        A, B = self.A.to(wide), self.B.to(wide)
        return self.s**2 * ((A @ A.t()) * (B.t() @ B)).sum()

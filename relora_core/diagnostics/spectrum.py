"""The singular values of a matrix, and three ranks computed from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from relora_core.distributed.sharding import full


@dataclass(frozen=True)
class Spectrum:
    r"""Singular values $\sigma_1 \ge \sigma_2 \ge \dots$ of a matrix.

    Args:
        values: the singular values, descending, float64 on the CPU; those left out are zero.
        shape: $(m, n)$ of the matrix.

    Examples:
        >>> spectrum = Spectrum.of(torch.diag(torch.tensor([4.0, 4.0, 2.0, 0.0])))
        >>> spectrum.rank(), spectrum.stable_rank, round(spectrum.effective_rank, 2)
        (3, 2.25, 2.87)
    """

    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: Tensor) -> "Spectrum":
        """Return the spectrum of a matrix by its SVD; a sharded matrix is gathered first.

        Args:
            matrix: `(m, n)`, or `(m, ...)` as a convolution's weight.
        """
        flat = full(matrix.detach()).flatten(1)
        values = torch.linalg.svdvals(flat.to(torch.promote_types(flat.dtype, torch.float64)))
        return cls(values.cpu(), (flat.shape[0], flat.shape[1]))

    def rank(self, tolerance: float | None = None) -> int:
        r"""Return how many singular values are above `tolerance` $\sigma_1$.

        Args:
            tolerance: at least 0 and below 1; if None, $\max(m, n) \cdot 2^{-23}$, below which
                float32 cannot tell a direction from rounding.

        Raises:
            ValueError: if `tolerance` is out of range.
        """
        if tolerance is None:
            tolerance = max(self.shape) * torch.finfo(torch.float32).eps
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1; got {tolerance}")
        return int((self.values > tolerance * self.values[:1]).sum())

    @property
    def effective_rank(self) -> float:
        r"""$\exp(-\sum_i p_i \ln p_i)$, $p_i = \sigma_i / \sum_j \sigma_j$; 0 for a zero matrix.

        Reference: Roy and Vetterli, The effective rank, EUSIPCO 2007.
        """
        total = self.values.sum()
        if total == 0:
            return 0.0
        return float(torch.special.entr(self.values / total).sum().exp())

    @property
    def stable_rank(self) -> float:
        r"""$\sum_i \sigma_i^2 / \sigma_1^2$; 0 for a zero matrix.

        Reference: Rudelson and Vershynin, Sampling from large matrices, J. ACM 54 (2007).
        """
        if not self.values[:1].any():
            return 0.0
        return float((self.values / self.values[0]).square().sum())

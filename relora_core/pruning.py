"""Prune a tensor by magnitude: exact in count, and the same sharded as on one device."""

import math

import torch
from torch import Tensor

from relora_core._sharding import full, local, local_part
from relora_core.selection import drop_count, smallest


@torch.no_grad()
def magnitude_prune_(tensor: Tensor, *, ratio: float) -> Tensor:
    r"""Zero the smallest entries of `tensor` by magnitude, exactly $k$ of them.

    $k = \lfloor \texttt{ratio} \cdot (n - 1) \rfloor + 1$ of $n$ entries: what is at or below the
    quantile at `ratio` goes, and among equals the first in memory order go first, so that the
    count is exact. The rest keeps its bits. A `DTensor` is pruned by its global order.

    The authors' code keeps `abs(x) > torch.quantile(abs(x), ratio)`: the same mask without ties,
    but it empties a tensor of equal values and fails above 2**24 entries.

    Args:
        tensor: floating point, any shape, changed in place.
        ratio: from 0 to 1; 1 zeroes everything.

    Returns:
        `tensor`.

    Raises:
        ValueError: if `ratio` is outside [0, 1] or `tensor` holds NaN. Nothing is changed then.
        TypeError: if `tensor` is not floating point (the codes of a quantized state are not
            magnitudes).

    Example:
        >>> magnitude_prune_(torch.tensor([3.0, -1.0, 2.0, -4.0, 1.0]), ratio=0.5)
        tensor([ 3.,  0.,  0., -4.,  0.])

    Reference: https://arxiv.org/abs/2307.05695, section 3, "optimizer reset".
    """
    check_ratio(ratio, "ratio")
    check_prunable(tensor)
    if has_nan([tensor]):
        raise ValueError("cannot rank a tensor that holds NaN: find what produced it")
    zero_where_(tensor, prune_mask(tensor, ratio))
    return tensor


def prune_mask(tensor: Tensor, ratio: float) -> Tensor:
    """Mark the entries of this rank's part of `tensor` that `magnitude_prune_` zeroes."""
    whole = full(tensor)
    if whole.dtype.itemsize == 1:  # torch ranks no 8-bit floats
        whole = whole.float()
    mask = smallest(whole, drop_count(tensor.numel(), ratio))
    return local_part(mask, tensor)


@torch.no_grad()
def zero_where_(tensor: Tensor, mask: Tensor) -> None:
    """Zero the entries of this rank's part of `tensor` that `mask` marks."""
    part = local(tensor)
    if part.dtype.itemsize == 1:  # torch fills no 8-bit floats; their zero is the byte 0
        part = part.view(torch.uint8)
    part.masked_fill_(mask, 0)


def has_nan(tensors: list[Tensor]) -> bool:
    """Whether any of `tensors` holds NaN, on any rank; waits for the device once."""
    # A sum is NaN if an entry is, and also for inf - inf: the sum of magnitudes is not.
    sums = [full(_sum_of_magnitudes(tensor.detach())) for tensor in tensors]
    return any(math.isnan(value) for value in to_floats(sums))


def _sum_of_magnitudes(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize == 1:  # torch adds no 8-bit floats
        tensor = tensor.float()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    total: Tensor = torch.linalg.vector_norm(tensor, 1, dtype=wide)
    return total.float()


def to_floats(scalars: list[Tensor]) -> list[float]:
    """Return the values of scalars of any devices; waits once."""
    if not scalars:
        return []
    values: list[float] = torch.stack([s.to(scalars[0].device) for s in scalars]).tolist()
    return values


def check_ratio(ratio: float, name: str) -> None:
    """Raise ValueError unless `ratio` lies in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name} must be between 0 and 1; got {ratio}")


def check_prunable(tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"magnitudes need a floating-point tensor; got {tensor.dtype}")

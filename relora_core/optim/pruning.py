"""Pruning by magnitude or at random: an exact count, and the same entries sharded or not."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from relora_core.distributed.local import local
from relora_core.distributed.sharding import local_part, shard_sum, sharding
from relora_core.optim.radix_select import drop_count, smallest
from relora_core.randomness import keyed_uniform


@torch.no_grad()
def magnitude_prune_(tensor: Tensor, *, ratio: float) -> Tensor:
    r"""Zero the smallest entries of `tensor` by magnitude, exactly $k$ of them.

    $k = \lfloor \texttt{ratio} \cdot (n - 1) \rfloor + 1$ of $n$ entries: those at or below the
    quantile at `ratio`. Among equal magnitudes the first in memory order are zeroed first, so the
    count is exact. All other entries keep their bits. A `DTensor` is pruned by its global order.

    The authors' code keeps `abs(x) > torch.quantile(abs(x), ratio)`: the same mask without ties,
    but it empties a tensor of equal values and fails above 2**24 entries.

    Args:
        tensor: the tensor to prune in place; floating point, of any shape.
        ratio: the fraction of its entries to zero, from 0 to 1; 1 zeroes everything.

    Returns:
        `tensor`.

    Raises:
        ValueError: if `ratio` is outside [0, 1] or `tensor` holds NaN. Nothing is changed then.
        TypeError: if `tensor` is not floating point (the codes of a quantized state are not
            magnitudes).

    Examples:
        >>> magnitude_prune_(torch.tensor([3.0, -1.0, 2.0, -4.0, 1.0]), ratio=0.5)
        tensor([ 3.,  0.,  0., -4.,  0.])

    Reference: https://arxiv.org/abs/2307.05695, section 3, "optimizer reset".
    """
    check_ratio(ratio, "ratio")
    check_prunable(tensor)
    if has_nan([tensor]):
        raise ValueError("a tensor to prune must hold no NaN: find what produced it")
    (mask,) = magnitude_masks([tensor], ratio)
    zero_where_(tensor, mask)
    return tensor


@torch.no_grad()
def random_prune_(tensor: Tensor, *, ratio: float, seed: int = 0) -> Tensor:
    r"""Zero entries of `tensor` chosen at random, exactly as many as `magnitude_prune_` would.

    $k = \lfloor \texttt{ratio} \cdot (n - 1) \rfloor + 1$ of $n$ entries, each set of them as
    likely as any other. The choice depends only on `seed` and the shape, so every process at every
    world size makes the same choice. The global generator is left alone.

    Args:
        tensor: the tensor to prune in place; floating point, of any shape.
        ratio: the fraction of its entries to zero, from 0 to 1; 1 zeroes everything.
        seed: the seed of the choice.

    Returns:
        `tensor`.

    Raises:
        ValueError: if `ratio` is outside [0, 1]. Nothing is changed then.
        TypeError: if `tensor` is not floating point.

    Examples:
        >>> int((random_prune_(torch.ones(1000), ratio=0.9) == 0).sum())
        900

    Reference: `reset_optimizer` of https://github.com/Guitaricet/relora, which keeps each entry
    with a probability instead, drawn on each process by itself.
    """
    check_ratio(ratio, "ratio")
    check_prunable(tensor)
    zero_where_(tensor, random_mask(tensor, ratio, f"{seed}"))
    return tensor


def magnitude_masks(tensors: Iterable[Tensor], ratio: float) -> list[Tensor]:
    """Mark the entries of this process's parts of `tensors` that `magnitude_prune_` zeroes."""
    # torch cannot sort 8-bit floats
    ranked = (tensor.float() if tensor.dtype.itemsize == 1 else tensor for tensor in tensors)
    return smallest((tensor, drop_count(tensor.numel(), ratio)) for tensor in ranked)


def random_mask(tensor: Tensor, ratio: float, key: str) -> Tensor:
    """Mark the entries of this process's part of `tensor` that a draw with this key chooses."""
    draw = keyed_uniform(f"{key}/prune", tensor.shape, bound=1.0)
    (mask,) = smallest([(draw, drop_count(draw.numel(), ratio))])
    return local_part(mask, tensor)


@torch.no_grad()
def zero_where_(tensor: Tensor, mask: Tensor) -> None:
    """Zero the entries of this process's part of `tensor` that `mask` marks."""
    part = local(tensor)
    if part.dtype.itemsize == 1:  # torch cannot fill 8-bit floats; their zero is the byte 0
        part = part.view(torch.uint8)
    part.masked_fill_(mask, 0)


def has_nan(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` holds NaN, on any process; waits for the device once.

    Tensors that are sharded over the same processes share one collective.
    """
    together: dict[object, list[Tensor]] = {}
    shards: dict[object, Tensor] = {}
    for tensor in tensors:
        place = (sharding(tensor), tensor.device)
        # A plain sum is also NaN for inf - inf; a sum of magnitudes is NaN only if an entry is.
        together.setdefault(place, []).append(_sum_of_magnitudes(local(tensor.detach())))
        shards.setdefault(place, tensor)
    sums = [shard_sum(torch.stack(own), shards[place]).sum() for place, own in together.items()]
    return any(math.isnan(value) for value in to_floats(sums))


def _sum_of_magnitudes(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize == 1:  # torch cannot add 8-bit floats
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
        raise TypeError(f"a tensor to prune must be floating point; got {tensor.dtype}")

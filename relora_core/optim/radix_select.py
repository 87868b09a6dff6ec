"""Selection of the smallest magnitudes, exact in count, sharded or not."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from relora_core.distributed.local import local
from relora_core.distributed.sharding import local_part, shard_sum, sharding

_DIGIT = 11  # bits per radix pass
_CHUNK = 2**18  # entries worked on at once, so that they stay in the cache
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop_count(entries: int, ratio: float) -> int:
    """Return how many of `entries` the prune rule drops: floor(ratio * (entries - 1)) + 1.

    Without ties, the entries that are kept are those of the ReLoRA authors'
    `abs(x) > quantile(abs(x), ratio)`. So ratio 0 drops one entry, and ratio 1 drops all.
    """
    return 0 if entries == 0 else math.floor(ratio * (entries - 1)) + 1


def smallest(tensors: Iterable[tuple[Tensor, int]]) -> list[Tensor]:
    """Mark the `count` entries of smallest magnitude in each tensor; ties go to the lower index.

    The index is the one in the whole tensor, so a sharded tensor gets the same mask as on one
    device. Tensors of one dtype that are sharded over the same processes share their collectives:
    at most six for each dimension of the mesh (nine for fp64), for any number of tensors. All
    other tensors are processed one at a time.

    Args:
        tensors: pairs of a tensor and its count. The tensor is floating point of 16 bits or more,
            without NaN, of any shape, sharded or not. The count is from 1 to the number of entries
            in the whole tensor (0 if the tensor is empty).

    Returns:
        For each tensor, a bool mask of this process's part. Except on the CPU, the host never
        waits.
    """
    masks: dict[int, Tensor] = {}
    together: dict[object, dict[int, tuple[Tensor, int]]] = {}
    for index, (tensor, count) in enumerate(tensors):
        if count in (0, tensor.numel()):  # none or all, in whatever order
            masks[index] = torch.full_like(local(tensor), bool(count), dtype=torch.bool)
        elif sharding(tensor) is None:
            part = local(tensor)
            select = _by_counting if part.device.type == "cpu" else _by_sorting
            masks[index] = select(part.flatten(), count).view(part.shape)
        else:
            place = (sharding(tensor), tensor.dtype)
            together.setdefault(place, {})[index] = (tensor, count)
    for group in together.values():
        shards, counts = zip(*group.values(), strict=True)
        on_cpu = local(shards[0]).device.type == "cpu"
        found = _of_shards(shards, counts, on_cpu=on_cpu)
        masks |= dict(zip(group, found, strict=True))
    return [masks[index] for index in sorted(masks)]


def _by_counting(flat: Tensor, count: int) -> Tensor:
    (threshold,), (left,), (ties,) = _kth([_Counted(flat)], [count], _width(flat), None)
    mask = _at_most(flat, threshold)
    if left < ties:
        equal = torch.cat([_key(chunk) == threshold for chunk in _chunks(flat)])
        mask[equal.nonzero().squeeze(1)[left:]] = False
    return mask


def _by_sorting(flat: Tensor, count: int) -> Tensor:
    order = flat.abs().argsort(stable=True)
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order[:count], True)


def _of_shards(shards: Sequence[Tensor], counts: Sequence[int], *, on_cpu: bool) -> list[Tensor]:
    parts = [local(shard).flatten() for shard in shards]
    rows = _Counted if on_cpu else _Sorted
    threshold, left, ties = _kth([rows(p) for p in parts], counts, _width(parts[0]), shards[0])
    masks = [_at_most(part, t) for part, t in zip(parts, threshold, strict=True)]
    # Ties are broken by the index in the whole tensor. Every process sees the same counts, so all
    # agree on whether that is needed. Off the CPU, reading the counts would make the host wait.
    if not on_cpu or bool((left < ties).any()):
        equal = [_key(part) == t for part, t in zip(parts, threshold, strict=True)]
        places = [_places(shard) for shard in shards]
        bits = max(shard.numel() for shard in shards).bit_length()
        keys = [
            rows(place[same] if on_cpu else place.where(same, 2**bits))
            for place, same in zip(places, equal, strict=True)
        ]
        last, _, _ = _kth(keys, left, bits + 1, shards[0])
        for mask, same, place, end in zip(masks, equal, places, last, strict=True):
            mask &= ~same | (place <= end)
    return [mask.view(local(shard).shape) for mask, shard in zip(masks, shards, strict=True)]


def _kth(
    rows: Sequence["_Counted | _Sorted"],
    counts: Sequence[int] | Tensor,
    width: int,
    like: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the `counts[i]`-th smallest key of each row by a radix select over `width` bits.

    Each pass finds the next bits of the result. It takes the keys whose higher bits agree with the
    result so far, and counts every value of their next bits over all processes that share `like`.

    Returns:
        The keys found; for each, how many equal keys are among the `counts[i]` smallest; and how
        many equal keys there are in all.
    """
    wanted = torch.as_tensor(counts, device=rows[0].device)
    found = torch.zeros_like(wanted)
    while width:
        step = min(_DIGIT, width)
        width -= step
        histogram = shard_sum(torch.stack([row.histogram(width, step) for row in rows]), like)
        up_to = histogram.cumsum(1)
        digit = torch.searchsorted(up_to, wanted.unsqueeze(1)).clamp_(max=2**_DIGIT - 1)
        equal = histogram.gather(1, digit).squeeze(1)
        wanted = wanted - (up_to.gather(1, digit).squeeze(1) - equal)
        found += digit.squeeze(1) << width
        for row, chosen in zip(rows, digit.squeeze(1), strict=True):
            row.keep(chosen, width, step)
    return found, wanted, equal


class _Counted:
    """Keys counted one by one, for the CPU, where reading the counts costs nothing."""

    def __init__(self, flat: Tensor) -> None:
        self.device = flat.device
        self.chunks = _chunks(flat)

    def histogram(self, shift: int, step: int) -> Tensor:
        total = torch.zeros(2**_DIGIT, dtype=torch.int64, device=self.device)
        for chunk in self.chunks:
            total += torch.bincount(_digit(chunk, shift, step), minlength=2**_DIGIT)
        return total

    def keep(self, digit: Tensor, shift: int, step: int) -> None:
        agree = [c[_digit(c, shift, step) == digit] for c in self.chunks]
        self.chunks = _chunks(torch.cat(agree))


class _Sorted:
    """Keys sorted once, then counted by binary search, for GPUs: the host does not wait."""

    def __init__(self, flat: Tensor) -> None:
        self.device = flat.device
        self.keys = _key(flat).to(torch.int64).sort().values
        self.found = torch.zeros((), dtype=torch.int64, device=flat.device)

    def histogram(self, shift: int, step: int) -> Tensor:
        edges = torch.arange(2**_DIGIT + 1, device=self.device).clamp_(max=2**step)
        return torch.searchsorted(self.keys, self.found + (edges << shift)).diff()

    def keep(self, digit: Tensor, shift: int, step: int) -> None:
        self.found = self.found + (digit << shift)


def _width(flat: Tensor) -> int:
    return 8 * flat.itemsize - 1


def _key(values: Tensor) -> Tensor:
    """Return the bits of the magnitudes as integers, which have the order of the magnitudes."""
    if not values.is_floating_point():
        return values
    return values.abs().view(_INTEGERS[values.itemsize])


def _digit(values: Tensor, shift: int, step: int) -> Tensor:
    digit: Tensor = (_key(values) >> shift) & (2**step - 1)
    return digit


def _at_most(flat: Tensor, threshold: Tensor) -> Tensor:
    mask = torch.empty_like(flat, dtype=torch.bool)
    for marked, chunk in zip(_chunks(mask), _chunks(flat), strict=True):
        torch.le(_key(chunk), threshold, out=marked)
    return mask


def _chunks(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, _CHUNK) if flat.device.type == "cpu" else (flat,)


def _places(shard: Tensor) -> Tensor:
    """Return, for each entry of this process's part, its index in the whole tensor."""
    whole = torch.arange(shard.numel(), device=local(shard).device).view(shard.shape)
    return local_part(whole, shard).flatten()

"""Which entries of a tensor are its smallest by magnitude, by an exact count."""

import math

import torch
from torch import Tensor

_DIGIT = 11  # bits a pass looks at
_CHUNK = 2**18  # entries worked on at once, so that they stay in the cache
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop_count(entries: int, ratio: float) -> int:
    """Return how many of `entries` the prune rule drops: floor(ratio * (entries - 1)) + 1.

    Keeping what lies strictly above that order statistic is the same mask as the ReLoRA authors'
    `abs(x) > quantile(abs(x), ratio)`, ties aside; so ratio 0 drops one entry and 1 drops all.
    """
    return 0 if entries == 0 else math.floor(ratio * (entries - 1)) + 1


def smallest(tensor: Tensor, count: int) -> Tensor:
    """Mark the `count` entries smallest by magnitude; among equals, the lowest index goes first.

    Args:
        tensor: floating point of 16 bits or more, of any shape, without NaN, on one device.
        count: from 0 to the number of entries.

    Returns:
        A bool tensor of the same shape with exactly `count` entries True.
    """
    flat = tensor.flatten()
    if count == 0:
        mask = torch.zeros_like(flat, dtype=torch.bool)
    elif flat.device.type == "cpu":
        mask = _by_counting(flat, count)
    else:
        mask = _by_sorting(flat, count)
    return mask.view(tensor.shape)


def _by_sorting(flat: Tensor, count: int) -> Tensor:
    """Sort them all: nothing waits for the device, which sorts fast."""
    order = flat.abs().argsort(stable=True)
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order[:count], True)


def _by_counting(flat: Tensor, count: int) -> Tensor:
    """Find the threshold by a radix select over the magnitudes' bits, which are in their order.

    Each pass counts how often every value of the next bits occurs among the entries that agree
    with the threshold so far, and so learns those bits of it.
    """
    chunks = _chunks(flat)
    candidates = chunks
    shift, digits, wanted = 8 * flat.itemsize - 1, 2**_DIGIT, count
    while shift:
        width = min(_DIGIT, shift)
        shift -= width
        histogram = torch.zeros(digits, dtype=torch.int64)
        for chunk in candidates:
            histogram += torch.bincount(_digit(chunk, shift, width), minlength=digits)
        up_to = histogram.cumsum(0)
        digit = int(torch.searchsorted(up_to, wanted))
        wanted -= int(up_to[digit] - histogram[digit])
        agree = torch.cat([c[_digit(c, shift, width) == digit] for c in candidates])
        candidates = _chunks(agree)
    threshold, ties = candidates[0][0].abs(), int(histogram[digit])

    mask = torch.empty_like(flat, dtype=torch.bool)
    for marked, chunk in zip(_chunks(mask), chunks, strict=True):
        torch.le(chunk.abs(), threshold, out=marked)
    if wanted < ties:
        equal = torch.cat([chunk.abs() == threshold for chunk in chunks])
        mask.index_fill_(0, equal.nonzero().squeeze(1)[wanted:], False)
    return mask


def _chunks(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, _CHUNK)


def _digit(chunk: Tensor, shift: int, width: int) -> Tensor:
    bits = chunk.abs().view(_INTEGERS[chunk.itemsize]) >> shift
    first = shift + width == 8 * chunk.itemsize - 1
    return bits if first else bits & (2**width - 1)

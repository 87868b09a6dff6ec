"""Which entries of a tensor are its smallest, by an exact count."""

import math

import torch
from torch import Tensor


def drop_count(entries: int, ratio: float) -> int:
    """Return how many of `entries` the prune rule drops: floor(ratio * (entries - 1)) + 1.

    Keeping what lies strictly above that order statistic is the same mask as the ReLoRA authors'
    `abs(x) > quantile(abs(x), ratio)`, ties aside; so ratio 0 drops one entry and 1 drops all.
    """
    return 0 if entries == 0 else math.floor(ratio * (entries - 1)) + 1


def smallest(magnitude: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest entries; among equals, those of the lowest index go first.

    Args:
        magnitude: of any shape, without NaN, on one device.
        count: from 0 to the number of entries.

    Returns:
        A bool tensor of the same shape with exactly `count` entries True. Nothing waits for the
        device.
    """
    if count == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    flat = magnitude.flatten()
    threshold = flat.kthvalue(count).values
    below = flat < threshold
    ties = flat == threshold
    rank_among_ties = ties.cumsum(0)
    return (below | (ties & (rank_among_ties <= count - below.sum()))).view(magnitude.shape)

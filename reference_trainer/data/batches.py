"""Batches out of prepared shards: a pure function of the seed and the step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reference_trainer.data.windows import Windows

_ROUNDS = 4


@dataclass(frozen=True)
class Batches:
    """The training order: every window once in an epoch, shuffled anew in each.

    There is no state between steps: the position is the step's number alone. A batch does not
    depend on how many processes share it.

    Args:
        windows: the windows to shuffle.
        sequences: the number of windows in a step's batch, over all processes.
        seed: the seed of the shuffling.
    """

    windows: Windows
    sequences: int
    seed: int

    def at(self, step: int) -> Tensor:
        """Return the whole batch of `step`: (sequences, length + 1), int64."""
        return self._read(self._positions(step))

    def part(self, step: int, *, rank: int, processes: int, micro_steps: int) -> Tensor:
        """Return, reading no more, one process's part of a batch: (micro_steps, n, length + 1).

        Args:
            step: the step of the run.
            rank: the process rank.
            processes: the number of processes that share the batch.
            micro_steps: the number of micro-steps in the step; all processes share each of them.
        """
        places = self._positions(step).reshape(micro_steps, processes, -1)[:, rank]
        return self._read(places.reshape(-1)).view(micro_steps, places.shape[1], -1)

    def _positions(self, step: int) -> NDArray[np.uint64]:
        return np.arange(step * self.sequences, (step + 1) * self.sequences, dtype=np.uint64)

    def _read(self, positions: NDArray[np.uint64]) -> Tensor:
        epochs, places = np.divmod(positions, np.uint64(len(self.windows)))
        return self.windows.read(shuffled(places, epochs, len(self.windows), self.seed))


def shuffled(
    places: NDArray[np.uint64], epochs: NDArray[np.uint64], size: int, seed: int
) -> NDArray[np.uint64]:
    """Permute `places`, all below `size`, by a permutation keyed by (seed, epoch).

    A four-round Feistel network over the next even power of two permutes the places without a
    table. A place that falls outside `size` is permuted again until it falls inside (cycle
    walking), which keeps the map one-to-one.

    Examples:
        >>> order = shuffled(np.arange(5, dtype=np.uint64), np.zeros(5, np.uint64), 5, seed=0)
        >>> sorted(order.tolist())
        [0, 1, 2, 3, 4]
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    places = places.copy()
    outside = np.ones(len(places), dtype=bool)
    while outside.any():
        left, right = places[outside] >> half, places[outside] & mask
        for number in range(_ROUNDS):
            key = _mix(
                _mix(_mix(np.full(1, seed, np.uint64)) + epochs[outside]) + np.uint64(number)
            )
            left, right = right, left ^ (_mix(right + key) & mask)
        places[outside] = (left << half) | right
        outside = places >= size
    return places


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

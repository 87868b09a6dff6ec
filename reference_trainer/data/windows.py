"""Windows of tokens, read from memory-mapped shards."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reference_trainer.data.index import Index, shard_path
from reference_trainer.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Windows of `length + 1` tokens of a split.

    In a shard, each begins at the last token of the one before; tokens that fill no window are left
    out.

    Args:
        shards: the split's memory-mapped tokens.
        length: the number of tokens that a model sees at once; the extra token is the last target.
    """

    shards: tuple[NDArray[np.unsignedinteger], ...]
    length: int

    def __len__(self) -> int:
        """Return how many windows there are."""
        return sum(self._counts())

    def read(self, numbers: NDArray[np.uint64]) -> Tensor:
        """Return the windows with these numbers, (len(numbers), length + 1), int64."""
        bounds = np.cumsum([0, *self._counts()])
        rows = []
        for number in numbers.astype(np.int64):
            shard = int(np.searchsorted(bounds, number, side="right")) - 1
            start = int(number - bounds[shard]) * self.length
            rows.append(self.shards[shard][start : start + self.length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def _counts(self) -> list[int]:
        return [max(0, (len(shard) - 1) // self.length) for shard in self.shards]


def open_windows(directory: Path, index: Index, split: str, length: int) -> Windows:
    """Open a split of a prepared directory.

    Args:
        directory: of the tokens.
        index: its index.
        split: "train" or "held_out".
        length: tokens that a model sees at once.

    Raises:
        UserError: if the split has less than one window.
    """
    shards = tuple(
        np.memmap(shard_path(directory, split, number), dtype=np.dtype(index.dtype), mode="r")
        for number in range(len(index.shards[split]))
    )
    windows = Windows(shards, length)
    if not len(windows):
        raise UserError(
            f"the {split} split has {index.tokens(split)} tokens, less than one window of "
            f"{length} + 1: give more text, or a smaller batch.length"
        )
    return windows

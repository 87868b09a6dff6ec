"""The index of a directory of tokens: what its shards hold, and their checksums."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference_trainer.checksums import read_sealed, verify
from reference_trainer.errors import DamagedError, UserError, one_line
from reference_trainer.validated import MismatchError, validated

SPLITS = ("train", "held_out")


FORMAT, INDEX, TOKENIZER = 2, "index.json", "tokenizer.json"


@dataclass(frozen=True)
class Index:
    """The contents of a directory of shards: its index.json, written last.

    Args:
        vocab_size: the number of ids; every id is below it.
        end: the id that closes a document.
        dtype: the dtype of the ids, little-endian.
        tokenizer: "bytes" or the tokenizer file's name; a copy of the file is beside the index.
        documents: the number of documents in each split.
        shards: for each split, the number of tokens in each of its files, `<split>-<number>.bin`.
        checksums: the checksum of every file beside the index.
    """

    vocab_size: int
    end: int
    dtype: str
    tokenizer: str
    documents: dict[str, int]
    shards: dict[str, list[int]]
    checksums: dict[str, str]
    format: int = FORMAT

    def tokens(self, split: str) -> int:
        """Return how many tokens a split has."""
        return sum(self.shards[split])


def read_index(directory: Path) -> Index:
    """Read the index of a prepared directory and check that every shard has the size it says.

    Raises:
        UserError: if the index or a shard is absent or damaged.
    """
    file = directory / INDEX
    if not file.is_file():
        raise UserError(f"{directory} holds no prepared data (no {INDEX}): run `prepare` first")
    try:
        index = validated(Index, read_sealed(file, format=FORMAT))
        sizes = _sizes(index, directory)
    except DamagedError as error:
        raise DamagedError(f"{error}: run `prepare` again") from None
    except (MismatchError, KeyError, TypeError) as error:
        raise DamagedError(f"{file} is damaged ({one_line(error)}): run `prepare` again") from None
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            raise DamagedError(f"{path} must have {size} bytes: run `prepare` again")
    return index


def verify_data(directory: Path) -> None:
    """Check every file of a prepared directory against the checksums in its index.

    Raises:
        UserError: if the index is absent, or a file is damaged; the message names the file.
    """
    verify(directory, read_index(directory).checksums)


def _sizes(index: Index, directory: Path) -> dict[Path, int]:
    width = np.dtype(index.dtype).itemsize
    return {
        shard_path(directory, split, number): tokens * width
        for split in SPLITS
        for number, tokens in enumerate(index.shards[split])
    }


def shard_path(directory: Path, split: str, number: int) -> Path:
    """Return the file of a split's shard."""
    return directory / f"{split}-{number:05d}.bin"

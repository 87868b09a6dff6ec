"""Tokenize documents into memory-mapped shards, once."""

import hashlib
import itertools
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from reference_trainer.config import DataConfig
from reference_trainer.documents import documents, sources
from reference_trainer.errors import DamagedError, UserError, one_line
from reference_trainer.sealed import checksum, read_sealed, verify, write_sealed
from reference_trainer.terminal import hidden
from reference_trainer.tokenizer import load_tokenizer
from reference_trainer.validated import MismatchError, validated

SPLITS = ("train", "held_out")
_FORMAT, _INDEX, _TOKENIZER = 2, "index.json", "tokenizer.json"
_SHARD_TOKENS = 2**28
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Index:
    """What a directory of shards holds; its index.json, written last.

    Args:
        vocab_size: ids are below it.
        end: the id that closes a document.
        dtype: of the ids, little-endian.
        tokenizer: "bytes" or the tokenizer file's name; a copy of it lies beside the index.
        documents: how many each split has.
        shards: for each split the tokens of each of its files, `<split>-<number>.bin`.
        checksums: of every file beside the index.
    """

    vocab_size: int
    end: int
    dtype: str
    tokenizer: str
    documents: dict[str, int]
    shards: dict[str, list[int]]
    checksums: dict[str, str]
    format: int = _FORMAT

    def tokens(self, split: str) -> int:
        """Return how many tokens a split has."""
        return sum(self.shards[split])


def prepare(config: DataConfig, directory: Path) -> Index:
    """Write the documents' tokens into `directory` and return its index.

    A document is held out if a hash of its text falls below `data.held_out`, and the one with the
    least hash always is: the split depends on nothing but the texts, and copies of a document lie
    on one side.

    Raises:
        UserError: if a file cannot be used, or there are fewer than two documents.
    """
    paths = sources(config)
    tokenizer = load_tokenizer(config.tokenizer)
    dtype = _smallest_dtype(tokenizer.vocab_size)
    writers = {split: _Writer(directory, split, dtype) for split in SPLITS}
    splitter = _Splitter(config.held_out, writers)
    size = sum(path.stat().st_size for path in paths)
    label = f"tokenizing {len(paths)} files"
    try:
        with tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=hidden()) as bar:
            for path in paths:
                found = documents(path, config.text_field)
                while batch := list(itertools.islice(found, _BATCH_DOCUMENTS)):
                    filled = [text for text in batch if text]
                    for text, ids in zip(filled, tokenizer.encode(filled), strict=True):
                        splitter.add(text, ids)
                bar.update(path.stat().st_size)
        splitter.finish()
    finally:
        for writer in writers.values():
            writer.close()
    if not all(writer.documents for writer in writers.values()):
        count = sum(writer.documents for writer in writers.values())
        raise UserError(
            "there must be a document to train on and another to hold out; got "
            f"{count} in {len(paths)} files (data.held_out={config.held_out}): a text file of "
            "up to 64 KiB is one document: give more of them, or .jsonl with a document a line"
        )
    checksums = writers["train"].checksums | writers["held_out"].checksums
    if config.tokenizer != "bytes":
        shutil.copy(config.tokenizer, directory / _TOKENIZER)
        checksums[_TOKENIZER] = checksum(directory / _TOKENIZER)
    index = Index(
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        dtype=dtype.str,
        tokenizer=Path(config.tokenizer).name,
        documents={split: writer.documents for split, writer in writers.items()},
        shards={split: writer.tokens for split, writer in writers.items()},
        checksums=checksums,
    )
    write_sealed(directory / _INDEX, asdict(index))
    return index


def read_index(directory: Path) -> Index:
    """Read the index of a prepared directory and check that every shard has the size it says.

    Raises:
        UserError: if it is absent or damaged.
    """
    file = directory / _INDEX
    if not file.is_file():
        raise UserError(f"{directory} holds no prepared data (no {_INDEX}): run `prepare` first")
    try:
        index = validated(Index, read_sealed(file, format=_FORMAT))
        sizes = _sizes(index, directory)
    except DamagedError as error:
        raise DamagedError(f"{error}: run `prepare` again") from None
    except (MismatchError, KeyError, TypeError) as error:
        raise DamagedError(f"{file} is damaged ({one_line(error)}): run `prepare` again") from None
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            raise DamagedError(f"{path} should have {size} bytes: run `prepare` again")
    return index


def verify_data(directory: Path) -> None:
    """Check every file of a prepared directory against the checksums in its index.

    Raises:
        UserError: if the index is absent, or anything is damaged; it names the file.
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


class _Writer:
    """Appends token ids to a split's shards, beginning a new one when one is full."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.directory = directory
        self.split = split
        self.dtype = dtype
        self.documents = 0
        self.tokens: list[int] = []
        self.checksums: dict[str, str] = {}
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()

    def add(self, ids: NDArray[np.uint32]) -> None:
        if self._file is None or self.tokens[-1] >= _SHARD_TOKENS:
            self.close()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = shard_path(self.directory, self.split, len(self.tokens)).open("wb")
            self._hash = hashlib.sha256()
            self.tokens.append(0)
        written = ids.astype(self.dtype).tobytes()
        self._file.write(written)
        self._hash.update(written)
        self.tokens[-1] += len(ids)
        self.documents += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.checksums[Path(self._file.name).name] = self._hash.hexdigest()


class _Splitter:
    """Sends documents to the writers, holding back the one of least hash until the end."""

    def __init__(self, held_out: float, writers: dict[str, _Writer]) -> None:
        self._bound = held_out
        self._writers = writers
        self._least: tuple[float, list[NDArray[np.uint32]]] = (1.0, [])

    def add(self, text: str, ids: NDArray[np.uint32]) -> None:
        digest = hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest()
        share = int.from_bytes(digest, "little") / 2**64
        least, copies = self._least
        if share < least:
            self._send(least, copies)
            self._least = (share, [ids])
        elif share == least:
            copies.append(ids)
        else:
            self._send(share, [ids])

    def finish(self) -> None:
        least, copies = self._least
        self._send(min(least, 0.0), copies)

    def _send(self, share: float, copies: list[NDArray[np.uint32]]) -> None:
        writer = self._writers["held_out" if share < self._bound else "train"]
        for ids in copies:
            writer.add(ids)


def _smallest_dtype(vocab_size: int) -> "np.dtype[np.unsignedinteger]":
    bits = 8 if vocab_size <= 2**8 else 16 if vocab_size <= 2**16 else 32
    return np.dtype(f"uint{bits}").newbyteorder("<")

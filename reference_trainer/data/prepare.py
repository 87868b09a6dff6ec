"""Documents tokenized once, into memory-mapped shards."""

import hashlib
import itertools
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from reference_trainer.checksums import checksum, write_sealed
from reference_trainer.config import DataConfig
from reference_trainer.data.documents import documents, sources
from reference_trainer.data.index import INDEX, SPLITS, TOKENIZER, Index, shard_path
from reference_trainer.data.tokenizer import load_tokenizer
from reference_trainer.errors import UserError
from reference_trainer.logging.console import hidden

_SHARD_TOKENS = 2**28
_BATCH_DOCUMENTS = 256


def prepare(config: DataConfig, directory: Path) -> Index:
    """Write the documents' tokens into `directory` and return its index.

    A document is held out if a hash of its text falls below `data.held_out`; the document with the
    lowest hash is always held out. So the split depends only on the texts, and copies of a document
    are in the same split.

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
            f"{count} in {len(paths)} files (data.held_out={config.held_out}): give more text "
            "files, as one of up to 64 KiB is one document, or .jsonl with a document per line"
        )
    checksums = writers["train"].checksums | writers["held_out"].checksums
    if config.tokenizer != "bytes":
        shutil.copy(config.tokenizer, directory / TOKENIZER)
        checksums[TOKENIZER] = checksum(directory / TOKENIZER)
    index = Index(
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        dtype=dtype.str,
        tokenizer=Path(config.tokenizer).name,
        documents={split: writer.documents for split, writer in writers.items()},
        shards={split: writer.tokens for split, writer in writers.items()},
        checksums=checksums,
    )
    write_sealed(directory / INDEX, asdict(index))
    return index


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
    """Sends documents to the writers; the one with the lowest hash is kept back until the end."""

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

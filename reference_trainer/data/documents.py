"""Documents out of text, .jsonl and .parquet files; by default the standard library's sources."""

import glob
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reference_trainer.config import DataConfig
from reference_trainer.errors import UserError

_WHOLE_BYTES, _PIECE = 2**16, 2**14


def sources(config: DataConfig) -> list[Path]:
    """Return the files to read, sorted.

    Raises:
        UserError: if a glob matches no file, or all files together are empty.
    """
    if not config.files:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [p for p in root.rglob("*.py") if "site-packages" not in p.parts]
        if not found:
            raise UserError(f"no Python source under {root}: give data.files")
        return sorted(found)
    found = []
    for pattern in config.files:
        pattern = str(Path(pattern).expanduser())
        if Path(pattern).is_dir():
            raise UserError(f"data.files: {pattern} is a directory: name its files, as {pattern}/*")
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        paths = [Path(p) for p in matches if Path(p).is_file()]
        if not paths:
            raise UserError(f"data.files: no file matches {pattern!r}")
        found += paths
    if not any(path.stat().st_size for path in found):
        raise UserError(f"data.files: all {len(found)} files are empty (first: {found[0]})")
    return sorted(set(found))


def documents(path: Path, text_field: str) -> Iterator[str]:
    """Iterate over a file's documents: lines of .jsonl, rows of .parquet, else the text itself.

    A text file of more than 64 KiB is cut at line ends into documents of about 16 KiB, so that one
    large file can be split and is never in memory whole.

    Raises:
        UserError: if the file is not what its name says, is binary or compressed, or a text is
            missing.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _lines(path, text_field)
    elif suffix == ".parquet":
        yield from _rows(path, text_field)
    else:
        yield from _pieces(path)


def _pieces(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace", newline="") as text:
        whole = path.stat().st_size <= _WHOLE_BYTES
        while piece := text.read() if whole else text.read(_PIECE) + text.readline(_PIECE):
            if "\0" in piece:
                raise UserError(
                    f"{path} is not UTF-8 text (it holds a NUL): decompress or convert it"
                )
            yield piece


def _lines(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number} is not JSON in UTF-8: {error}") from None
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{path}:{number} has no text under {text_field!r}")
            yield text.encode("utf-8", errors="replace").decode()  # half a surrogate pair: "?"


def _rows(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet as parquet  # a large import, and rarely needed

    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None
    if text_field not in file.schema_arrow.names:
        names = file.schema_arrow.names
        raise UserError(f"{path} has no column {text_field!r}; it has {names}")
    number = 0
    for batch in _batches(file, path, text_field):
        for text in batch.column(0).to_pylist():
            number += 1
            if not isinstance(text, str):
                raise UserError(f"{path}: row {number} has no text under {text_field!r}")
            yield text


def _batches(file: Any, path: Path, column: str) -> Iterator[Any]:
    try:
        yield from file.iter_batches(batch_size=1024, columns=[column])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None

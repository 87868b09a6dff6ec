"""Files with a checksum, inside or beside them, so that damage is noticed."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reference_trainer.errors import DamagedError
from reference_trainer.files import write_whole
from reference_trainer.logging.console import hidden

_SEAL = "sha256"
_LARGEST = 2**28  # bytes: no JSON of ours comes near it


def checksum(file: Path) -> str:
    """Return the SHA-256 checksum of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(directory: Path, checksums: Mapping[str, str]) -> None:
    """Check files of `directory` against their checksums, by name.

    Raises:
        DamagedError: if a file is absent or differs; the message names it.
    """
    for name in checksums:
        if Path(name).name != name:
            raise DamagedError(f"{name!r} is not a file's name in {directory}")
        if not (directory / name).is_file():
            raise DamagedError(f"{directory / name} is damaged (it is absent)")
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        found = pool.map(checksum, (directory / name for name in checksums))
        total, pairs = len(checksums), zip(checksums, found, strict=True)
        bar = tqdm(pairs, "verifying", total, unit="file", delay=2, disable=hidden())
        for name, actual in bar:
            if actual != checksums[name]:
                raise DamagedError(f"{directory / name} is damaged (its checksum differs)")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DamagedError: if the file is absent or holds no JSON object. A file larger than any of ours
            is read in part, and so is an error.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(_LARGEST)
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{file} is damaged (it holds no object)")
    return value


def write_sealed(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object and its checksum, whole or not at all."""
    write_whole(file, json.dumps({**value, _SEAL: _digest(value)}, indent=2))


def read_sealed(file: Path, *, format: int) -> dict[str, Any]:
    """Return the object that `write_sealed` wrote.

    Args:
        file: the file to read.
        format: the value that its "format" must have.

    Raises:
        DamagedError: if the file is not as it was written, or has another format.
    """
    value = read_json(file)
    seal = value.pop(_SEAL, None)
    if "format" in value and value["format"] != format:
        raise DamagedError(
            f"{file} is of another version of this trainer (format {value['format']!r:.20}; "
            f"this one reads {format})"
        )
    if seal != _digest(value):
        raise DamagedError(f"{file} is damaged (its checksum differs)")
    return value


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

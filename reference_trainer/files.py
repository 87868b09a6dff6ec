"""Files and directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees all of it or nothing."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give a name to write to, and put that in `file`'s place if the block ends well."""
    partial = file.with_name(file.name + ".partial")
    yield partial
    partial.replace(file)


@contextmanager
def fresh_directory(directory: Path) -> Iterator[None]:
    """Make a directory and its parents; if the block raises, remove whatever was made."""
    made = directory
    while not made.parent.exists():
        made = made.parent
    directory.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(made)
        raise

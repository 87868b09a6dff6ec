"""Files and directories that appear whole or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reference_trainer.errors import UserError


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
def fresh_directory(directory: Path) -> Iterator[Path]:
    """Give a directory to fill, which takes `directory`'s place if the block ends well.

    Otherwise it is removed, and so are the parents that were made for it and are empty.
    """
    parents = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name[:50]}.", dir=directory.parent))
    partial.chmod(0o755)
    try:
        yield partial
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial)
        for parent in parents:
            if not any(parent.iterdir()):
                parent.rmdir()
        raise


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold `file` against every other process that asks for it here.

    Raises:
        UserError: if another one holds it.
    """
    with file.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file.parent} is in use by a run that goes on: wait for it") from None
        yield

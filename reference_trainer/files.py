"""Files and directories that appear whole or not at all."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reference_trainer.errors import UserError


def write_whole(file: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees all of it or nothing."""
    with replaced(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give a name to write to, and put that in `file`'s place if the block ends well."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")  # of this writer alone
    try:
        yield partial
        _sync(partial)
        partial.replace(file)
        _sync(file.parent)  # so that it is there after a power cut, too
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def fresh_directory(directory: Path) -> Iterator[Path]:
    """Give a directory to fill, which takes `directory`'s place if the block ends well.

    Otherwise it is removed, and so are the parents that were made for it and are empty. What a
    process left that was killed here is cleared by the next one.

    Raises:
        UserError: if another process fills it now.
    """
    parents = [parent for parent in directory.parents if not parent.exists()]
    partial = directory.with_name(f".{directory.name[:200]}.partial")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    with _held(partial, f"{directory} is being made by another process: wait for it"):
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
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
    with _held(file, f"{file.parent} is in use by a run that goes on: wait for it"):
        yield


@contextmanager
def _held(path: Path, otherwise: str) -> Iterator[None]:
    # NFS locks what is open for writing only; a directory cannot be, and is locked on this machine.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(otherwise) from None
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked against other runs ({error.strerror}): mount its file "
                "system with flock, or put `runs` on another"
            ) from None
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise UserError(otherwise)  # it was put elsewhere between the two lines above
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

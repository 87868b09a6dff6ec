"""Files and directories that appear whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reference_trainer.errors import UserError
from relora_core.files import whole


def write_whole(file: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees all of it or nothing."""
    with replaced(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give a path to write to; the file there then replaces `file` if the block ends well.

    Raises:
        UserError: if `file` exists and is not a regular file.
    """
    if file.exists():
        try:
            whole.refuse_irregular(file)
        except ValueError as error:
            raise UserError(str(error)) from None
    with whole.replaced(file) as partial:
        yield partial


@contextmanager
def fresh_directory(directory: Path) -> Iterator[Path]:
    """Yield a directory to fill; it becomes `directory` if the block succeeds.

    Otherwise it is removed, and so are the parents that were made for it and are empty. If a
    process is killed here, the next one clears what it left.

    Raises:
        UserError: if another process is filling it now.
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
    """Lock `file` against every other process that calls this function.

    Raises:
        UserError: if another process holds the lock.
    """
    with _held(file, f"{file.parent} is in use by a run in progress: wait for it"):
        yield


@contextmanager
def _held(path: Path, otherwise: str) -> Iterator[None]:
    # NFS locks only what is open for writing. A directory cannot be: its lock is this machine's.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(otherwise) from None
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked against other runs ({error.strerror}): mount its file "
                "system with flock, or put `runs` on another file system"
            ) from None
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise UserError(otherwise)  # it was moved between open and flock above
        yield
    finally:
        os.close(descriptor)

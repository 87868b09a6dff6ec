"""Files that appear whole or not at all, and tensors in them."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a path to write to; its content replaces `file`, or is removed after an error.

    If `file` is a symbolic link, the file that it points to is replaced and the link stays.

    Raises:
        ValueError: if `file` exists and is not a regular file.
        OSError: if `file` is a symbolic link that points to itself.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replaced(file) as partial:
        ...     _ = partial.write_text("whole")
        >>> [path.name for path in file.parent.iterdir()]
        ['notes.txt']
    """
    try:
        file = file.resolve()
    except RuntimeError:  # Python 3.11 and 3.12; to later versions the file is absent
        raise OSError(f"{file} is a symbolic link that points to itself") from None
    if file.exists():
        refuse_irregular(file)
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")  # this writer's alone
    partial.touch(exist_ok=False)
    try:
        mode = partial.stat().st_mode  # the umask's, which some writers would change
        yield partial
        partial.chmod(mode)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(file)
        if os.name == "posix":  # Windows opens no directories
            directory = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # so that the new name survives a power cut
            finally:
                os.close(directory)
    finally:
        partial.unlink(missing_ok=True)


def refuse_irregular(file: Path) -> None:
    """Raise ValueError if `file` is a directory, a device, a pipe or a socket.

    Raises:
        FileNotFoundError: if `file` does not exist.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is absent")
    if not file.is_file():
        raise ValueError(
            f"{file} must be a regular file; it is a directory, a device, a pipe or a socket: give "
            "another path"
        )


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: if the file cannot be written; safetensors itself would raise its own error.
    """
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from None

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
    """Give a path to write to: what lies there then takes the place of `file`, or goes.

    Of a link the file that it leads to is replaced, and the link stays.

    Raises:
        ValueError: if `file` is there and no regular file.
        OSError: if it is a link that leads to itself.

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
    except RuntimeError:  # Python 3.11 and 3.12; later ones find it absent
        raise OSError(f"{file} is a link that leads to itself") from None
    if file.exists():
        refuse_irregular(file)
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")  # of this writer alone
    partial.touch(exist_ok=False)
    try:
        mode = partial.stat().st_mode  # as the umask has it, whoever writes
        yield partial
        partial.chmod(mode)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def refuse_irregular(file: Path) -> None:
    """Raise ValueError if what is there is a directory, a device, a pipe or a socket.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is absent")
    if not file.is_file():
        raise ValueError(f"{file} must be a regular file: it is a directory, a device or a pipe")


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: if it cannot be written; safetensors has an error of its own for that.
    """
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from None

"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Give a path to write to: what lies there then takes the place of `file`, or goes.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replaced(file) as partial:
        ...     _ = partial.write_text("whole")
        >>> [path.name for path in file.parent.iterdir()]
        ['notes.txt']
    """
    partial = file.with_name(file.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it, whoever writes
        yield partial
        partial.chmod(mode)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)

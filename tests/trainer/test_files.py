"""Files are locked against other processes, on the file systems that clusters have."""

import errno
import fcntl
import os

import pytest

from reference_trainer.errors import UserError
from reference_trainer.files import fresh_directory, locked, replaced


def test_two_writers_of_a_file_leave_one_s_whole(tmp_path):
    """As the end of a run and a `report --watch` of it."""
    file = tmp_path / "report.html"
    with replaced(file) as last:
        with replaced(file) as first:
            first.write_text("first")
            last.write_text("last")
        assert file.read_text() == "first"
    assert file.read_text() == "last"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_locked_as_nfs_wants_it(tmp_path, monkeypatch):
    """NFS locks what is open for writing only, but for directories."""

    def flock(descriptor: int, operation: int) -> None:
        reads = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if reads and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    file = tmp_path / "config.yaml"
    file.write_text("steps: 1\n")
    with locked(file):
        assert file.read_text() == "steps: 1\n"
    with fresh_directory(tmp_path / "new"):
        pass
    assert (tmp_path / "new").is_dir()


def test_where_nothing_can_be_locked_it_is_refused_with_what_to_do(tmp_path, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    file = tmp_path / "config.yaml"
    file.touch()
    fix = "No locks available.*mount its file system with flock"
    with pytest.raises(UserError, match=fix), locked(file):
        raise AssertionError

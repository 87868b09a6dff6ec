"""Files written past the page cache hold what was given, whatever the file system requires."""

import errno
import fcntl
import hashlib
import os

import numpy as np
import pytest

from reference_trainer.checkpoint import streamed

CONTENT = np.arange(3 * 4096 + 5, dtype=np.uint8)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only Linux writes past the page cache")
def test_a_file_system_of_larger_pages_is_written_through_the_cache(tmp_path, monkeypatch):
    write, refused = os.write, []

    def aligned(file, content):
        direct = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
        if direct and len(content) % 65536:
            refused.append(len(content))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, content)

    with streamed._Stream(tmp_path / "file") as stream:
        flags = fcntl.fcntl(stream._file, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            pytest.skip("this file system has no O_DIRECT")
        monkeypatch.setattr(os, "write", aligned)
        stream.write(CONTENT)
    assert refused
    assert (tmp_path / "file").read_bytes() == CONTENT.tobytes()
    assert stream.checksum == hashlib.sha256(CONTENT.tobytes()).hexdigest()


def test_another_error_is_the_callers(tmp_path, monkeypatch):
    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(OSError, match="No space left"),
        streamed._Stream(tmp_path / "file") as stream,
    ):
        stream.write(CONTENT)

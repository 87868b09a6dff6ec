"""A process's peak memory is the most that it has held since the measurement began."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from reference_trainer.logging import memory as peak
from reference_trainer.logging.memory import PeakMemory
from reference_trainer.main import main
from tests.trainer.runs import records

MiB = 2**20


def held() -> int:
    """Return what this process holds now, in bytes. Apart from ours it may fall at any time."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="only /proc forgets a peak")
def test_it_forgets_what_was_before_and_sees_what_is_freed_again():
    large = torch.ones(200 * MiB, dtype=torch.uint8)
    before = held()
    del large
    seen = PeakMemory(torch.device("cpu"))
    assert seen.bytes() < before - 150 * MiB
    small = torch.ones(100 * MiB, dtype=torch.uint8)
    within = held()
    del small
    assert seen.bytes() > within - MiB
    assert held() < within - 75 * MiB


def test_where_proc_does_not_tell_it_is_that_of_the_process(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\n")
    monkeypatch.setattr(peak, "_STATUS", status)
    monkeypatch.setattr(peak, "_FORGET", tmp_path / "absent")
    assert PeakMemory(torch.device("cpu")).bytes() >= held()


def test_a_run_writes_down_its_own(tiny, tmp_path):
    assert main(["train", *tiny, "--steps", "6"]) == 0
    found = [record["peak_memory"] for record in records(tmp_path / "runs/first-run", "step")]
    assert found == sorted(found)
    assert found[0] >= 100 * MiB  # torch alone takes more

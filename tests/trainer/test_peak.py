"""The peak of a process's memory is what it held at most, since it was asked to look."""

import sys

import pytest
import torch

from reference_trainer.commands import main
from reference_trainer.peak import PeakMemory
from tests.trainer.conftest import records

MiB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only /proc forgets a peak")
def test_it_forgets_what_was_before_and_sees_what_is_freed_again():
    held = torch.ones(200 * MiB, dtype=torch.uint8)
    del held
    peak = PeakMemory(torch.device("cpu"))
    before = peak.bytes()
    small = torch.ones(50 * MiB, dtype=torch.uint8)
    del small
    assert 40 * MiB <= peak.bytes() - before <= 80 * MiB


def test_a_run_writes_down_its_own(tiny, tmp_path):
    assert main(["train", *tiny, "--steps", "6"]) == 0
    found = [record["peak_memory"] for record in records(tmp_path / "runs/first-run", "step")]
    assert found == sorted(found)
    assert found[0] >= 100 * MiB  # torch alone takes more

"""A run that is killed, again and again, ends with the bytes of one that is not."""

import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.victims import NO_FAULT, attempt, drawn, output
from tests.trainer.runs import TINY, losses, trained

ARGUMENTS = [*TINY, "--checkpoint.every", "2", "--parallel.timeout", "0.5"]
RUN, KILLED = "runs/first-run", -signal.SIGKILL


def killed_until_it_ends(directory: Path, size: int, generator: random.Random) -> Counter[str]:
    """Begin a run again and again, with a fault each time, until one passes without; count them."""
    directory.mkdir()
    struck: Counter[str] = Counter()
    for number in range(100):
        fault, victim = drawn(generator), generator.randrange(size)
        codes = attempt(ARGUMENTS, directory, size, fault, number=number, victim=victim)
        # Who is left alone says so, and ends; who had nothing more to hear from the dead is done.
        assert set(codes) <= {0, 2, KILLED}, output(directory)
        if KILLED not in codes:
            assert set(codes) == {0}, output(directory)
            return struck
        struck[f"{fault.moment}, {'all' if fault.everywhere or size == 1 else 'one'}"] += 1
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_bytes_of_one_that_is_not(tmp_path, size, kills):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert attempt(ARGUMENTS, whole, size, NO_FAULT) == [0] * size
    expected, generator = trained(whole / RUN), random.Random(f"{size} processes, {kills} kills")
    struck: Counter[str] = Counter()
    for run in range(kills):
        directory = tmp_path / f"run-{run}"
        struck += killed_until_it_ends(directory, size, generator)
        found = trained(directory / RUN)
        assert found.keys() == expected.keys()
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, output(directory)
        assert losses(directory / RUN) == losses(whole / RUN)
        assert "damaged" not in output(directory)
        assert not list((directory / "runs").glob(".*"))
        if struck.total() >= kills:
            break
    print(f"{size} processes: {struck.total()} kills of {run + 1} runs: {dict(struck)}")
    assert struck.total() >= kills

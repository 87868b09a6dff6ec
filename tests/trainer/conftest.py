"""A tiny run: a package of Python's as text, a model that trains in seconds."""

import shutil
from pathlib import Path

import pytest

from reference_trainer.main import main
from tests.trainer.runs import TINY, leave_undrawn


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[str]:
    """Return the arguments of a tiny run, from within an empty directory; it draws nothing."""
    monkeypatch.chdir(tmp_path)
    leave_undrawn(monkeypatch.setattr)
    return list(TINY)


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory) -> Path:
    """Return a directory that holds the tiny run, trained."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        leave_undrawn(patch.setattr)
        assert main(["train", *TINY, "--quiet"]) == 0
    return directory / "runs"


@pytest.fixture
def finished(tiny, finished_runs) -> list[str]:
    """Return the arguments of the tiny run, from within a directory that has it, trained."""
    shutil.copytree(finished_runs, "runs")
    return tiny

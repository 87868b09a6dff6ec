"""A tiny run: a package of Python's as text, a model that trains in seconds."""

import email
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reference_trainer.files import replaced
from reference_trainer.main import main
from reference_trainer.report import command, page
from reference_trainer.report.recorded import Recorded

SOURCES = str(Path(email.__file__).parent / "*.py")
TINY = [
    *("--data.files", SOURCES, "--data.held_out", "0.2"),
    *("--model.preset", "9m", "--model.hidden_size", "32", "--model.intermediate_size", "48"),
    *("--model.layers", "2", "--model.heads", "4", "--model.kv_heads", "2"),
    *("--batch.sequences", "4", "--batch.length", "32", "--batch.micro", "2"),
    *("--steps", "20", "--optim.warmup", "2"),
    *("--relora.warm_start", "6", "--relora.rank", "4", "--relora.every", "5"),
    *("--relora.warmup", "2", "--log.every", "1", "--log.evaluate_every", "7"),
    *("--log.evaluate_sequences", "5", "--checkpoint.every", "4"),
]


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


def leave_undrawn(put: Callable[[object, str, object], None]) -> None:
    """Leave the page and the picture of a run empty: to draw them takes longer than it trains."""
    put(page, "_figure", lambda runs: "")
    put(command, "draw", _written_empty)


def _written_empty(run: Recorded, picture: Path) -> None:
    with replaced(picture) as partial:
        partial.write_bytes(b"")


def records(directory: Path, event: str) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


def losses(directory: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(directory, "step")}

"""A run read back from its directory: its records, its options and what follows from them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reference_trainer import options
from reference_trainer.errors import UserError
from reference_trainer.logging.metrics import read
from reference_trainer.logging.records import (
    End,
    Evaluation,
    Ranks,
    Record,
    Restart,
    Skipped,
    Spike,
    Start,
    Step,
)


@dataclass(frozen=True)
class Recorded:
    """A run.

    Args:
        name: the name of its directory.
        records: the records of its metrics.jsonl.
        options: its options by dotted name; empty if there is no config.yaml beside the metrics.
    """

    name: str
    records: Sequence[Record]
    options: dict[str, Any]

    @cached_property
    def starts(self) -> list[Start]:
        """Each start: one, and one for each time that the run was resumed."""
        return [r for r in self.records if r["event"] == "start"]

    @cached_property
    def trained(self) -> list[Step]:
        """The records of training steps."""
        return [r for r in self.records if r["event"] == "step"]

    @cached_property
    def skipped(self) -> list[Skipped]:
        """The steps that were skipped."""
        return [r for r in self.records if r["event"] == "skipped"]

    @cached_property
    def spikes(self) -> list[Spike]:
        """The jumps of the loss."""
        return [r for r in self.records if r["event"] == "spike"]

    @cached_property
    def restarts(self) -> list[Restart]:
        """The restarts."""
        return [r for r in self.records if r["event"] == "restart"]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The held-out losses."""
        return [r for r in self.records if r["event"] == "evaluation"]

    @cached_property
    def ends(self) -> list[End]:
        """The spectra at the end of a phase."""
        return [r for r in self.records if r["event"] == "end"]

    @property
    def start(self) -> Start:
        """The record of the last start: environment, number of processes, seed and rank."""
        return self.starts[-1]

    @property
    def steps(self) -> tuple[int, int | None]:
        """The number of steps done, and the number of all steps, if that is known."""
        last = max(record["step"] for record in [*self.trained, *self.skipped])
        return last + 1, self.options.get("steps")

    @property
    def handed_over(self) -> int | None:
        """The step at which the warm start ended, if there was one and it has."""
        begun = next((r["step"] for r in self.evaluations if r["phase"] == "relora"), None)
        return begun or None  # 0: there was none

    @property
    def rates(self) -> list[Step | Restart]:
        """The records that hold learning rates; at a restart's step they are zero."""
        return [r for r in self.records if r["event"] == "step" or r["event"] == "restart"]

    @property
    def ranks(self) -> list[tuple[int, Ranks]]:
        """Pairs of a number of merged cycles and the record of the ranks measured then."""
        measured: list[tuple[int, Ranks]] = [(r["restart"], r) for r in self.restarts]
        measured += [(r["cycles"], r) for r in self.ends]
        return [(cycles, record) for cycles, record in measured if record["ranks"]]


def ranks(record: Ranks) -> Mapping[str, float]:
    """Return each matrix's rank."""
    return record["ranks"]


def effective_ranks(record: Ranks) -> Mapping[str, float]:
    """Return each matrix's effective rank; none in records of older versions."""
    return record.get("effective_ranks", {})


def open_run(directory: Path) -> Recorded:
    """Return the run in a directory.

    Raises:
        UserError: if its metrics are absent, damaged or hold no step.
    """
    metrics, config = directory / "metrics.jsonl", directory / "config.yaml"
    if not metrics.is_file():
        raise UserError(f"{directory} holds no metrics.jsonl: give a run's directory")
    run = Recorded(
        directory.resolve().name,
        read(metrics),
        options.values(options.resolve(config, {})) if config.is_file() else {},
    )
    if not run.starts or not run.trained:
        raise UserError(f"{metrics} holds no training step to draw")
    return run


def learned(run: Recorded) -> list[str]:
    """Return three lines: loss, restarts and rank reached."""
    held_out, restarts = run.evaluations, run.restarts
    first, last = held_out[0], held_out[-1]
    handed_over = next((r for r in reversed(held_out) if r["phase"] == "warm-start"), None)
    lines = [
        f"held-out loss: {first['held_out_loss']:.3f} nats a token at the start"
        + (f", {handed_over['held_out_loss']:.3f} after the warm start" if handed_over else "")
        + f", {last['held_out_loss']:.3f} at the end"
    ]
    if restarts:
        zeroed = statistics.mean(r["zeroed_fraction"] for r in restarts)
        lines.append(
            f"restarts: {len(restarts)}, each merging {restarts[-1]['sites']} matrices and zeroing "
            f"{zeroed:.1%} of the adapters' moments"
        )
    else:
        lines.append("restarts: none")
    if run.ends:
        cycles, record = run.ranks[-1]
        found, r = record["ranks"].values(), run.start["rank"]
        lines.append(
            f"rank of the accumulated update: {min(found)} to {max(found)} after {cycles} cycles "
            f"of rank {r} (bound {record['bound']})"
        )
    else:
        lines.append("rank of the accumulated update: not measured")
    return lines

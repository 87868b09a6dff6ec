"""A run as its directory tells it: records and options, and what they come to."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reference_trainer import options
from reference_trainer.errors import UserError
from reference_trainer.metrics import read

Record = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """A run.

    Args:
        name: of its directory.
        records: of its metrics.jsonl.
        options: by dotted name; empty where there is no config.yaml beside the metrics.
    """

    name: str
    records: Sequence[Record]
    options: dict[str, Any]

    def of(self, *events: str) -> list[Record]:
        """Return the records of some events, in their order."""
        return [record for record in self.records if record["event"] in events]

    @cached_property
    def start(self) -> Record:
        """The last start: environment, processes, seed and rank."""
        return self.of("start")[-1]

    @property
    def steps(self) -> tuple[int, int | None]:
        """The steps that are done, and how many there are to be, if that is known."""
        last = max(record["step"] for record in self.of("step", "skipped"))
        return last + 1, self.options.get("steps")

    @property
    def handed_over(self) -> int | None:
        """The step at which the warm start ended, if there was one and it has."""
        begun = next((r["step"] for r in self.of("evaluation") if r["phase"] == "relora"), None)
        return begun or None  # 0: there was none

    @property
    def rates(self) -> list[Record]:
        """The records that hold learning rates; at a restart's step they are zero."""
        return self.of("step", "restart")

    @property
    def ranks(self) -> list[tuple[int, Record]]:
        """How many cycles were merged, with the record of the ranks then, where they were taken."""
        measured = [(r["restart"], r) for r in self.of("restart")]
        measured += [(r["cycles"], r) for r in self.of("end")]
        return [(cycles, record) for cycles, record in measured if record["ranks"]]


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
    if not run.of("start") or not run.of("step"):
        raise UserError(f"{metrics} holds no training step to draw")
    return run


def learned(run: Recorded) -> list[str]:
    """Return three lines: loss, restarts and rank reached."""
    held_out, restarts = run.of("evaluation"), run.of("restart")
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
    if run.of("end"):
        cycles, record = run.ranks[-1]
        ranks, r = record["ranks"].values(), run.start["rank"]
        lines.append(
            f"rank of the accumulated update: {min(ranks)} to {max(ranks)} after {cycles} cycles "
            f"of rank {r} (bound {record['bound']})"
        )
    else:
        lines.append("rank of the accumulated update: not measured")
    return lines

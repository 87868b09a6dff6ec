"""The results of a suite: a JSON Lines file to which every process appends its records."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_trainer.errors import UserError, one_line

_FILE = "results.jsonl"


def results_of(directory: Path) -> Path:
    """Return the file of a suite's results."""
    return directory / _FILE


@dataclass(frozen=True)
class Report:
    """The writer of a job's records.

    Args:
        directory: directory of the suite.
        job: name of the job.
    """

    directory: Path
    job: str

    def write(self, event: str, **values: Any) -> None:
        """Append a complete record in one unbuffered write."""
        line = json.dumps({"event": event, "job": self.job, **values}, allow_nan=False)
        whole = line.encode() + b"\n"
        with results_of(self.directory).open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(whole) < len(whole):  # the disk is full: part of the line was written
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

    def measured(
        self,
        what: str,
        value: float,
        unit: str = "s",
        *,
        expected: float | None = None,
        baseline: str | None = None,
        **more: Any,
    ) -> None:
        """Append a figure.

        Args:
            what: name of the figure, unique in the suite.
            value: measured value.
            unit: "s", "bytes", "bytes/s", "FLOP/s", or the name of the counted things.
            expected: value of the roofline; None if another job writes it or none is known.
            baseline: name of the figure to which the table shows the ratio.
            more: further entries of the record.
        """
        known = {"expected": expected, "baseline": baseline}
        given = {name: found for name, found in known.items() if found is not None}
        self.write("measured", what=what, value=value, unit=unit, **given, **more)


def read(directory: Path) -> list[dict[str, Any]]:
    """Return the records of a suite so far; a truncated last line is removed from the file.

    Raises:
        UserError: if the file is damaged or does not belong to a suite.
    """
    file = results_of(directory)
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        file.write_bytes(whole)
    try:
        records = [json.loads(line) for line in whole.splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)}") from None
    if not all(
        isinstance(record, dict) and {"event", "job"} <= record.keys() for record in records
    ):
        raise UserError(f"{file} must hold records of a suite: give --out another directory")
    return records

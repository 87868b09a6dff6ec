"""The command `report`: a page of one run or several, and the picture of one."""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from reference_trainer.errors import UserError
from reference_trainer.files import write_whole
from reference_trainer.report.page import page
from reference_trainer.report.picture import draw
from reference_trainer.report.recorded import Recorded, open_run

EXAMPLES = """examples:
  python -m reference_trainer report runs/first-run
      runs/first-run/report.html and report.png, also while the run is in progress
  python -m reference_trainer report runs/first-run --watch 30
      rewritten every 30 seconds until the run ends; an open browser tab reloads it
  python -m reference_trainer report runs/rank-8 runs/rank-16 --out compared.html
      two runs on one page, with the options in which they differ
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add(
        "directories",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run directory, such as runs/first-run",
    )
    add("--out", type=Path, help="HTML page to write (default: report.html in the run)")
    add(
        "--watch",
        type=int,
        metavar="SECONDS",
        help="write the page again at this interval until the runs end",
    )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Run the command; iterate over what it prints.

    Raises:
        UserError: if an argument is wrong.
    """
    directories: Sequence[Path] = arguments.directories
    if len(directories) > 1 and arguments.out is None:
        raise UserError("--out must be given for several runs, which share no directory")
    if arguments.watch is not None and arguments.watch < 1:
        raise UserError(f"--watch must be 1 second or more; got {arguments.watch}")
    out = arguments.out or directories[0] / "report.html"
    told = False
    while arguments.watch is not None:
        runs = opened(directories)
        if all(map(_ended, runs)):
            break
        _write_page(runs, directories, out, refresh=arguments.watch)
        if not told:
            yield f"page:    {out}, rewritten every {arguments.watch} s"
            told = True
        time.sleep(arguments.watch)
    yield from write(directories, out)


def write(directories: Sequence[Path], out: Path) -> Iterator[str]:
    """Write the page of the runs and, for a single run, its picture; yield lines that say where."""
    runs = opened(directories)
    _write_page(runs, directories, out)
    yield f"page:    {out}"
    if len(runs) == 1:
        picture = out.with_suffix(".png")
        draw(runs[0], picture)
        yield f"picture: {picture}"


def opened(directories: Sequence[Path]) -> list[Recorded]:
    """Return the runs in the directories, named by directory or, if names repeat, by path.

    Raises:
        UserError: if one holds no run.
    """
    runs = [open_run(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):
        pairs = zip(runs, directories, strict=True)
        runs = [replace(run, name=str(directory)) for run, directory in pairs]
    return runs


def _write_page(
    runs: Sequence[Recorded], directories: Sequence[Path], out: Path, refresh: int | None = None
) -> None:
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    made = f"made {now} from {', '.join(map(str, directories))}"
    write_whole(out, page(runs, made=made, refresh=refresh))


def _ended(run: Recorded) -> bool:
    done, steps = run.steps
    return steps is None or done >= steps

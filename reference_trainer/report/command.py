"""The command `report`: a page of one run or several, and the picture of one."""

import argparse
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from reference_trainer.errors import UserError
from reference_trainer.files import write_whole
from reference_trainer.report.page import page
from reference_trainer.report.picture import draw
from reference_trainer.report.recorded import Recorded, open_run

EXAMPLES = """examples:
  python -m reference_trainer report runs/first-run
      runs/first-run/report.html and report.png, also while the run goes on
  python -m reference_trainer report runs/first-run --watch 30
      made again every 30 seconds until the run is at its end; a browser that shows it follows
  python -m reference_trainer report runs/rank-8 runs/rank-16 --out compared.html
      two runs on one page, with the options in which they differ
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("directories", type=Path, nargs="+", metavar="RUN", help="directories, as runs/first-run")
    add("--out", type=Path, help="the page to write (of one run: report.html in it)")
    add("--watch", type=int, metavar="SECONDS", help="make it again so often, to the runs' end")


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """Run the command; iterate over what it prints.

    Raises:
        UserError: if something given is wrong.
    """
    directories: Sequence[Path] = arguments.directories
    if len(directories) > 1 and arguments.out is None:
        raise UserError("several runs have no directory of their own: say where with --out FILE")
    if arguments.watch is not None and arguments.watch < 1:
        raise UserError(f"--watch is in seconds, 1 or more; got {arguments.watch}")
    out = arguments.out or directories[0] / "report.html"
    told = False
    while True:
        runs = [open_run(directory) for directory in directories]
        goes_on = arguments.watch is not None and not all(map(_ended, runs))
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        made = f"made {now} from {', '.join(map(str, directories))}"
        write_whole(out, page(runs, made=made, refresh=arguments.watch if goes_on else None))
        if not told:
            yield f"page:    {out}"
            told = True
        if not goes_on:
            break
        time.sleep(arguments.watch)
    if len(directories) == 1:
        picture = out.with_suffix(".png")
        draw(runs[0], picture)
        yield f"picture: {picture}"


def _ended(run: Recorded) -> bool:
    done, steps = run.steps
    return steps is None or done >= steps

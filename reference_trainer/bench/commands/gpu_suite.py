"""The command `bench gpu-suite`: ten minutes of a GPU, measured beside the roofline."""

import argparse
import signal
from pathlib import Path

import torch

from reference_trainer.bench.suite.jobs import EXPECTED, JOBS
from reference_trainer.bench.suite.records import Report, read, results_of
from reference_trainer.bench.suite.runner import run_jobs
from reference_trainer.bench.suite.sizes import sizes
from reference_trainer.bench.suite.table import off, table
from reference_trainer.environment import environment
from reference_trainer.errors import UserError
from reference_trainer.files import locked, write_whole

EXAMPLES = """examples:
  python -m reference_trainer bench gpu-suite --minutes 9 --out docs/results/gpu
      all nine stages on the first GPU; again, with the same --out: what has not ended well
  python -m reference_trainer bench gpu-suite --minutes 5 --out runs/suite
      on a machine without a GPU: every stage on small shapes, to see that it runs

Each stage runs in processes of its own, each with a time limit: one that fails, hangs, is killed or
runs out of memory costs only itself. DIR holds results.jsonl (a line as soon as there is a figure),
table.md and the processes' output. All stages need torch, numpy, einops, safetensors, tokenizers,
PyYAML and tqdm; single ones pytest and hypothesis (2) and pydantic (6). The exit code is 0 once the
time is up or every stage has been tried; the table says how each ended.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="minutes for all remaining jobs (default: 9)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of results, which may hold some already",
    )


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if something given is wrong, or the results that are there are another GPU's.
    """
    if not 0 < arguments.minutes <= 1440:
        raise UserError(f"--minutes must lie between 0 and 1440; got {arguments.minutes:g}")
    directory: Path = arguments.out
    here = _here()
    directory.mkdir(parents=True, exist_ok=True)
    results_of(directory).touch()
    with locked(results_of(directory)):
        if not _check(directory, here):
            Report(directory, "").write("suite", **here)
        for number in (signal.SIGTERM, signal.SIGHUP):  # so that no process is left
            signal.signal(number, signal.default_int_handler)
        run_jobs(JOBS, directory, seconds=60 * arguments.minutes, beside=EXPECTED)
        records = read(directory)
        text, wrong = table(records), off(records)
        if here["cuda"] and wrong:
            text += "\n\nOff the roofline by more than 15 percent:\n\n- " + "\n- ".join(wrong)
        write_whole(directory / "table.md", text + "\n")
    return [text, "", f"results: {directory}"]


def _check(directory: Path, here: dict[str, object]) -> bool:
    """Return whether a suite has begun there; refuse one of another machine."""
    records = read(directory)
    begun = [record for record in records if record["event"] == "suite"]
    if records and not begun:
        raise UserError(f"{directory} holds no records of a suite: give --out another directory")
    for name in ("device", "torch") if begun else ():
        if begun[0].get(name) != here[name]:
            raise UserError(
                f"{directory} has results of {begun[0].get(name)}, and this is {here[name]}: give "
                "--out another directory"
            )
    return bool(begun)


def _here() -> dict[str, object]:
    chosen = sizes()
    known = {"cuda": chosen.device == "cuda", "gpu": chosen.gpu, "seed": 0}
    return {**environment(torch.device(chosen.device)), **known}

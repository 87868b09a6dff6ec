"""The command `bench gpu-suite`: ten minutes of GPU measurements, compared with the roofline."""

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
      run all nine stages on the first GPU; run again with the same --out to repeat only the jobs
      that did not succeed
  python -m reference_trainer bench gpu-suite --minutes 5 --out runs/suite
      run every stage with small shapes on a machine without a GPU, as a test

Each stage runs in separate processes with time limits. A process that fails, hangs, is killed or
runs out of memory does not affect the others. DIR holds results.jsonl (each figure is written as
soon as it is measured), table.md and the processes' output. All stages need torch, numpy, einops,
safetensors, tokenizers, PyYAML and tqdm. Stage 2 also needs pytest and hypothesis; stage 6 also
needs pydantic. The exit code is 0 if the time is up or every stage was tried; the table shows how
each job ended.
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
        help="directory of the results; it may hold results of earlier runs",
    )


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid, or the directory holds results of another GPU or torch.
    """
    if not 0 < arguments.minutes <= 1440:
        raise UserError(f"--minutes must be between 0 and 1440; got {arguments.minutes:g}")
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
    """Return whether the directory holds a suite; raise UserError if it is another machine's."""
    records = read(directory)
    begun = [record for record in records if record["event"] == "suite"]
    if records and not begun:
        raise UserError(f"{directory} must hold records of a suite: give --out another directory")
    for name in ("device", "torch") if begun else ():
        if begun[0].get(name) != here[name]:
            raise UserError(
                f"{directory} must hold results of {here[name]}; got {begun[0].get(name)}: give "
                "--out another directory"
            )
    return bool(begun)


def _here() -> dict[str, object]:
    chosen = sizes()
    known = {"cuda": chosen.device == "cuda", "gpu": chosen.gpu, "seed": 0}
    return {**environment(torch.device(chosen.device)), **known}

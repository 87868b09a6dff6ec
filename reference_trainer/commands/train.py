"""The command `train`: a run begun or resumed, and lines that say what it has learned."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from reference_trainer import options
from reference_trainer.config import Config
from reference_trainer.distributed import world_size
from reference_trainer.errors import UserError
from reference_trainer.preflight import preflight
from reference_trainer.report.command import write
from reference_trainer.report.recorded import learned, open_run
from reference_trainer.run_directory import check_begun_alike, check_new, goes_on
from reference_trainer.run_summary import summary_of
from reference_trainer.train import train

EXAMPLES = """examples:
  python -m reference_trainer train
      a small model on this Python's standard library, in minutes, in runs/first-run
  python -m reference_trainer train --name wiki --data.files 'wiki/*.jsonl' --model.preset 60m \\
      --batch.length 512 --steps 20000 --relora.warm_start 5000 --relora.every 5000
      your own text, a larger model
  torchrun --nproc-per-node 8 -m reference_trainer train --config run.yaml
      every option from a file; FSDP2 over 8 GPUs
  python -m reference_trainer train --config run.yaml --dry-run 8
      what that would do over 8 processes: parameters, memory, steps, restarts, files
  python -m reference_trainer train --resume --name wiki
      continue after a crash, from the newest complete checkpoint
"""
USAGE = "[--config FILE] [--resume] [--dry-run [PROCESSES]] [--OPTION VALUE ...]"
_LAUNCHERS = ("TORCHELASTIC", "SLURM")  # these count how often they have restarted a job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        help="YAML file of options; those on the command line take precedence",
    )
    add(
        "--resume",
        action="store_true",
        help="resume the run of this name (implied when torchrun or Slurm restarts it)",
    )
    add(
        "--dry-run",
        nargs="?",
        type=int,
        const=world_size(),
        metavar="PROCESSES",
        help="print what the run would do over this number of processes and stop",
    )
    options.add_options(parser)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Run the command; iterate over what it prints.

    Raises:
        UserError: if an argument is wrong.
    """
    again = any(int(os.environ.get(f"{by}_RESTART_COUNT", "0")) for by in _LAUNCHERS)
    config = _resolved(arguments, again)
    if arguments.dry_run is not None:
        yield from _planned(config, arguments.dry_run, resume=arguments.resume)
        return
    first = os.environ.get("RANK", "0") == "0"
    try:
        train(config, resume=arguments.resume, again=again)
    except KeyboardInterrupt:
        if first:
            sys.stderr.write(f"\n{goes_on(config)}\n")
        raise
    if first:
        directory = config.directory
        yield from ("", *learned(open_run(directory)), "", f"model:   {directory / 'export'}")
        yield from write([directory], directory / "report.html")


def _resolved(arguments: argparse.Namespace, again: bool) -> Config:
    given = options.given(arguments)
    file = arguments.config
    if (arguments.resume or again) and file is None:
        base = options.resolve(None, {k: v for k, v in given.items() if k in ("name", "runs")})
        saved = base.directory / "config.yaml"
        if saved.is_file():  # under this name, even if the run was begun under another
            file, given = saved, {**given, "name": base.name, "runs": base.runs}
    return options.resolve(file, given)


def _planned(config: Config, processes: int, *, resume: bool) -> Iterator[str]:
    if processes < 1:
        raise UserError(f"--dry-run must be 1 process or more; got {processes}")
    plan = preflight(config, processes=processes, resume=resume)
    if resume:
        check_begun_alike(config)
    else:
        check_new(config.directory)
    yield from summary_of(plan)
    yield "Nothing has been written."

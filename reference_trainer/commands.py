"""The commands: what each is given, and what it runs."""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from reference_trainer import options
from reference_trainer.begin import check, check_begun_alike, check_new, goes_on
from reference_trainer.bench import command as bench
from reference_trainer.config import Config, DataConfig
from reference_trainer.errors import SharedError, Stopped, UserError, one_line
from reference_trainer.estimate import command as estimate
from reference_trainer.export import export
from reference_trainer.files import fresh_directory
from reference_trainer.plan import plan
from reference_trainer.prepare import prepare
from reference_trainer.report import command as report
from reference_trainer.report.recorded import learned, open_run
from reference_trainer.study import command as study
from reference_trainer.terminal import open_terminal
from reference_trainer.train import train
from reference_trainer.world import open_world, world_size

_EXAMPLES = """examples:
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
      go on after a crash, from the newest complete checkpoint
"""

_QUIET = "--quiet", logging.WARNING, "no progress: results, warnings and errors only"
_VERBOSE = "--verbose", logging.DEBUG, "a line for each record of a step and each checkpoint too"
_LAUNCHERS = ("TORCHELASTIC", "SLURM")  # which count how often they have started a job again


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, exit code 2, and name the nearest option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def unknown(self, argument: str) -> UserError:
        """Return the error for an option that this parser does not have."""
        own = [string for action in self._actions for string in action.option_strings]
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            return UserError(f"{name!r} is no option, and no value of one: see --help")
        return UserError(f"unknown option {argument}{options.nearest(name, own)} (see --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0, or 2 for something given that is wrong or a file that cannot be used, or 75 for a run that
    was asked to stop and has saved where it stands, or 130 for Ctrl-C.
    Every process of several tells its own errors.
    """
    try:
        known, unknown = parser().parse_known_args(arguments)
        if unknown:
            raise known.parser.unknown(unknown[0])
        open_terminal(known.heard)
        known.run(known)
    except (UserError, OSError) as error:
        if not isinstance(error, SharedError):  # which is told already
            rank = os.environ.get("RANK")
            where = f" on rank {rank} ({socket.gethostname()})" if rank else ""
            sys.stderr.write(f"error{where}: {one_line(error)}\n")
        if "--debug" in (sys.argv if arguments is None else arguments):
            raise
        return 2
    except Stopped:
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    formatting = argparse.RawDescriptionHelpFormatter
    whole = _Parser(
        prog="python -m reference_trainer",
        description="Train a Llama with ReLoRA: a full-rank warm start, then low-rank cycles.",
        epilog=_EXAMPLES,
        formatter_class=formatting,
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, help: str, *, usage: str | None = None, verbose: bool = False
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=help,
            usage=usage and f"{whole.prog} {name} {usage}",
            description=help,
            formatter_class=formatting,
            allow_abbrev=False,
        )
        made.set_defaults(parser=made)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        heard = made.add_mutually_exclusive_group()
        for option, level, help in (_QUIET, _VERBOSE) if verbose else (_QUIET,):
            heard.add_argument(option, action="store_const", dest="heard", const=level, help=help)
        made.set_defaults(heard=logging.INFO)
        return made

    one = command(
        "train",
        "train a model, export it and draw its picture",
        usage="[--config FILE] [--resume] [--dry-run [PROCESSES]] [--OPTION VALUE ...]",
        verbose=True,
    )
    one.epilog = _EXAMPLES
    one.add_argument("--config", type=Path, help="a YAML file of options; the command line wins")
    one.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of this name (implied where torchrun or Slurm start it again)",
    )
    one.add_argument(
        "--dry-run",
        nargs="?",
        type=int,
        const=world_size(),
        metavar="PROCESSES",
        help="say what the run would do, over so many processes, and stop",
    )
    options.add_options(one)
    one.set_defaults(run=_train)

    one = command(
        "prepare",
        "tokenize text into memory-mapped shards, once for many runs",
        usage="[--config FILE] [--data.OPTION VALUE ...] OUT",
    )
    one.add_argument("out", type=Path, help="the directory to make; give it to --data.prepared")
    one.add_argument("--config", type=Path, help="a YAML file of options; the command line wins")
    options.add_options(one, only="data")
    one.set_defaults(run=_prepare)

    one = command(
        "export",
        "write a run's newest checkpoint as a merged Hugging Face Llama",
        usage="[--parallel.OPTION VALUE ...] RUN",
    )
    one.add_argument("directory", type=Path, help="of the run, such as runs/first-run")
    options.add_options(one, only="parallel")
    one.set_defaults(run=_export)

    one = command("bench", "measure the arms that a user would pick instead, interleaved")
    one.epilog = bench.EXAMPLES
    bench.add_arguments(one)
    one.set_defaults(run=lambda arguments: _say(*bench.bench(arguments)))

    one = command("estimate", "say what a run would need and how fast it would be, without a GPU")
    one.epilog = estimate.EXAMPLES
    estimate.add_arguments(one)
    one.set_defaults(run=lambda arguments: _say(*estimate.estimate(arguments)))

    one = command("study", "train the paper's arms side by side at sizes for a CPU")
    one.epilog = study.EXAMPLES
    study.add_arguments(one)
    one.set_defaults(run=lambda arguments: _tell(study.study(arguments)))

    one = command("report", "make one page of a run, or of several, also while they run")
    one.epilog = report.EXAMPLES
    report.add_arguments(one)
    one.set_defaults(run=lambda arguments: _tell(report.report(arguments)))
    return whole


def _train(arguments: argparse.Namespace) -> None:
    given = options.given(arguments)
    file = arguments.config
    again = any(int(os.environ.get(f"{by}_RESTART_COUNT", "0")) for by in _LAUNCHERS)
    if (arguments.resume or again) and file is None:
        base = options.resolve(None, {k: v for k, v in given.items() if k in ("name", "runs")})
        saved = base.directory / "config.yaml"
        if saved.is_file():  # found here, whatever it was called when it was begun
            file, given = saved, {**given, "name": base.name, "runs": base.runs}
    config = options.resolve(file, given)
    if arguments.dry_run is not None:
        processes = arguments.dry_run
        if processes < 1:
            raise UserError(f"--dry-run is over 1 process or more; got {processes}")
        check(config, processes=processes, resume=arguments.resume)
        if arguments.resume:
            check_begun_alike(config)
        else:
            check_new(config.directory)
        _tell(plan(config, processes=processes, resume=arguments.resume))
        _say("Nothing has been written.")
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
        _say("", *learned(open_run(directory)), "", f"model:   {directory / 'export'}")
        _tell(report.write([directory], directory / "report.html"))


def _prepare(arguments: argparse.Namespace) -> None:
    config = options.resolve(arguments.config, options.given(arguments)).data
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists already: give another directory")
    if world_size() > 1:
        raise UserError("`prepare` runs as one process: start it without torchrun")
    with fresh_directory(arguments.out) as made:
        index = prepare(_without_prepared(config), made)
    counts = ", ".join(f"{split} {index.tokens(split):,}" for split in index.shards)
    _say(f"{arguments.out}: tokens {counts}", f"use it with --data.prepared {arguments.out}")


def _without_prepared(config: DataConfig) -> DataConfig:
    if config.prepared:
        raise UserError("`prepare` makes prepared data: give data.files instead of data.prepared")
    return config


def _export(arguments: argparse.Namespace) -> None:
    given = {"parallel.replicas": 1, **options.given(arguments)}
    config = _run(arguments.directory, given)
    with open_world(config.parallel) as world:
        target = export(config, world)
    _say(f"model: {target}")


def _run(directory: Path, given: dict[str, object]) -> Config:
    file = directory / "config.yaml"
    if not file.is_file():
        raise UserError(f"{directory} holds no run (no config.yaml): give a run's directory")
    whole = directory.resolve()
    return options.resolve(file, {**given, "runs": str(whole.parent), "name": whole.name})


def _tell(lines: Iterable[str]) -> None:
    """Print what takes a while line by line."""
    for line in lines:
        _say(line)


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)  # noqa: T201 - what the command was asked for

"""The program, which imports the command that is asked for and runs it."""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NoReturn

from reference_trainer.errors import SharedError, Stopped, UserError, one_line
from reference_trainer.logging.console import open_terminal
from reference_trainer.nearest import nearest

_EXAMPLES = """examples:
  python -m reference_trainer train
      a small model on this Python's standard library, in minutes, in runs/first-run
  torchrun --nproc-per-node 8 -m reference_trainer train --config run.yaml
      every option from a file; FSDP2 over 8 GPUs
  python -m reference_trainer report runs/first-run
      the page and the picture of a run, also while it runs
  python -m reference_trainer train --help
      every option of a command with its default, and more examples
"""


@dataclass(frozen=True)
class _Command:
    """A command, as it is known before its module is imported, which takes seconds.

    Args:
        help: what the command does.
        module: the module in this package that has EXAMPLES, `add_arguments`, `run` and, perhaps,
            USAGE.
        verbose: whether the command has --verbose.
        commands: its subcommands; if there are any, there is no module.
    """

    help: str
    module: str = ""
    verbose: bool = False
    commands: "dict[str, _Command]" = field(default_factory=dict)


_BENCHMARKS = {
    "step": _Command("time training steps of several arms in turn", "bench.commands.step"),
    "restart": _Command(
        "time a restart against a full-rank optimizer step", "bench.commands.restart"
    ),
    "prune": _Command("time exact pruning against torch.quantile", "bench.commands.prune"),
    "checkpoint": _Command("time steps while a checkpoint is written", "bench.commands.checkpoint"),
    "traffic": _Command("count the bytes that a process sends", "bench.commands.traffic"),
    "memory": _Command("track the peak memory of a process", "bench.commands.memory"),
    "roofline": _Command(
        "list the kernels of a step and their times on a GPU that need not be present",
        "bench.commands.roofline",
    ),
    "gpu-suite": _Command(
        "measure everything on a GPU in ten minutes, and compare it with the roofline",
        "bench.commands.gpu_suite",
    ),
    "show": _Command("show saved measurements", "bench.commands.show"),
}
_COMMANDS = {
    "train": _Command(
        "train a model, export it and draw its picture", "commands.train", verbose=True
    ),
    "prepare": _Command("tokenize text into shards that many runs can share", "commands.prepare"),
    "export": _Command(
        "write a run's newest checkpoint as a merged Hugging Face Llama", "commands.export"
    ),
    "bench": _Command("compare ReLoRA with its alternatives, in ratios", commands=_BENCHMARKS),
    "estimate": _Command(
        "say what a run would need and how fast it would be, without a GPU",
        "bench.estimate.command",
    ),
    "report": _Command(
        "draw one page of a run or of several, also while they run", "report.command"
    ),
}
_PROGRAM = "python -m reference_trainer"
_QUIET = "--quiet", logging.WARNING, "no progress: results, warnings and errors only"
_VERBOSE = "--verbose", logging.DEBUG, "also a line for each recorded step and each checkpoint"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, give exit code 2 and name the nearest option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def unknown(self, argument: str) -> UserError:
        """Return the error for an option that this parser does not have."""
        own = [string for action in self._actions for string in action.option_strings]
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            return UserError(f"{name!r} is neither an option nor the value of one: see --help")
        return UserError(f"unknown option {argument}{nearest(name, own)} (see --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its `exit_code`."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: _run(given), debug="--debug" in given)


def _run(given: Sequence[str]) -> None:
    path, commands = _path(given)
    if commands and given[len(path) :] and given[len(path)] not in ("-h", "--help"):
        first = given[len(path)]
        if first.startswith("-"):
            raise UserError(
                f"{first} must come after a command: give one of {', '.join(commands)} first"
            )
    known, unknown = parser(*path).parse_known_args(given)
    if unknown:
        raise known.parser.unknown(unknown[0])
    open_terminal(known.heard)
    for line in known.run(known):
        print(line, flush=True)  # noqa: T201 - what the command was asked for


def exit_code(program: Callable[[], None], *, debug: bool = False) -> int:
    """Run a program and return its exit code; each process prints its own errors.

    The exit code is 0; 2 for a wrong argument or an unusable file; 75 for a run that was asked to
    stop and has saved a checkpoint; 130 for Ctrl-C.

    Args:
        program: the program.
        debug: whether to raise errors of the exit code 2, for their traceback.
    """
    try:
        program()
    except (UserError, OSError) as error:
        if not isinstance(error, SharedError):  # the first process has printed it already
            rank = os.environ.get("RANK")
            where = f" on process rank {rank} ({socket.gethostname()})" if rank else ""
            sys.stderr.write(f"error{where}: {one_line(error)}\n")
        if debug:
            raise
        return 2
    except Stopped:
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def load(*given: str) -> Any:
    """Import the command that `given` begins with; return its module, or None without one."""
    command = None
    commands = _COMMANDS
    for name in _path(given)[0]:
        command = commands[name]
        commands = command.commands
    if command is None or not command.module:
        return None
    return import_module(f"reference_trainer.{command.module}")


def _path(given: Sequence[str]) -> tuple[list[str], dict[str, _Command]]:
    """Return the command that `given` begins with, and the subcommands that may follow it."""
    path: list[str] = []
    commands = _COMMANDS
    for name in given:
        if name not in commands:
            break
        path.append(name)
        commands = commands[name].commands
    return path, commands


def parser(*names: str) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        names: the command, and its subcommand, whose arguments the parser knows. Of all other
            commands it has only the help text.
    """
    whole = _Parser(
        prog=_PROGRAM,
        description="Train a Llama with ReLoRA: a full-rank warm start, then low-rank cycles.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_commands(whole, _COMMANDS, (), names)
    return whole


def _add_commands(
    parser: argparse.ArgumentParser,
    commands: dict[str, _Command],
    above: tuple[str, ...],
    names: tuple[str, ...],
) -> None:
    dest = " ".join(("command", *above))
    added = parser.add_subparsers(dest=dest, required=True, metavar="COMMAND")
    for name, command in commands.items():
        one = added.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        path = (*above, name)
        if path != names[: len(path)]:
            continue
        if command.commands:
            _add_commands(one, command.commands, path, names)
            continue
        module = load(*path)
        assert module is not None
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        heard = one.add_mutually_exclusive_group()
        for option, level, help in (_QUIET, _VERBOSE) if command.verbose else (_QUIET,):
            heard.add_argument(option, action="store_const", dest="heard", const=level, help=help)
        module.add_arguments(one)
        one.epilog = module.EXAMPLES
        one.set_defaults(parser=one, heard=logging.INFO, run=module.run)
        if hasattr(module, "USAGE"):
            one.usage = f"{_PROGRAM} {' '.join(path)} {module.USAGE}"

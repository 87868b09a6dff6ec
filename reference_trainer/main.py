"""The program: imports the command that is asked for, and runs it."""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from reference_trainer.errors import SharedError, Stopped, UserError, one_line
from reference_trainer.nearest import nearest
from reference_trainer.terminal import open_terminal

_EXAMPLES = """examples:
  python -m reference_trainer train
      a small model on this Python's standard library, in minutes, in runs/first-run
  torchrun --nproc-per-node 8 -m reference_trainer train --config run.yaml
      every option from a file; FSDP2 over 8 GPUs
  python -m reference_trainer report runs/first-run
      its page and its picture, also while it runs
  python -m reference_trainer train --help
      every option of a command with its default, and more examples
"""


@dataclass(frozen=True)
class _Command:
    """What is known of a command before it is imported, which takes seconds.

    Args:
        help: what it does.
        module: of this package, with EXAMPLES, `add_arguments` and `run`; it may have a USAGE.
        verbose: whether it can say more than usual.
    """

    help: str
    module: str
    verbose: bool = False


_COMMANDS = {
    "train": _Command(
        "train a model, export it and draw its picture", "commands.train", verbose=True
    ),
    "prepare": _Command(
        "tokenize text into memory-mapped shards, once for many runs", "commands.prepare"
    ),
    "export": _Command(
        "write a run's newest checkpoint as a merged Hugging Face Llama", "commands.export"
    ),
    "bench": _Command(
        "measure the arms that a user would pick instead, interleaved", "bench.command"
    ),
    "estimate": _Command(
        "say what a run would need and how fast it would be, without a GPU", "estimate.command"
    ),
    "study": _Command("train the paper's arms side by side at sizes for a CPU", "study.command"),
    "report": _Command(
        "make one page of a run, or of several, also while they run", "report.command"
    ),
}
_QUIET = "--quiet", logging.WARNING, "no progress: results, warnings and errors only"
_VERBOSE = "--verbose", logging.DEBUG, "a line for each record of a step and each checkpoint too"


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
        return UserError(f"unknown option {argument}{nearest(name, own)} (see --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0, or 2 for something given that is wrong or a file that cannot be used, or 75 for a run that
    was asked to stop and has saved where it stands, or 130 for Ctrl-C.
    Every process of several tells its own errors.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0].startswith("-") and given[0] not in ("-h", "--help"):
            raise UserError(
                f"{given[0]} comes before a command: first one of {', '.join(_COMMANDS)}"
            )
        known, unknown = parser(*given[:1]).parse_known_args(given)
        if unknown:
            raise known.parser.unknown(unknown[0])
        open_terminal(known.heard)
        for line in known.run(known):
            print(line, flush=True)  # noqa: T201 - what the command was asked for
    except (UserError, OSError) as error:
        if not isinstance(error, SharedError):  # which is told already
            rank = os.environ.get("RANK")
            where = f" on rank {rank} ({socket.gethostname()})" if rank else ""
            sys.stderr.write(f"error{where}: {one_line(error)}\n")
        if "--debug" in given:
            raise
        return 2
    except Stopped:
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def load(name: str) -> Any:
    """Import a command and return its module; None if there is none of this name."""
    command = _COMMANDS.get(name)
    return command and import_module(f"reference_trainer.{command.module}")


def parser(*names: str) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        names: of the commands whose arguments it knows; of the others it knows what they do.
    """
    whole = _Parser(
        prog="python -m reference_trainer",
        description="Train a Llama with ReLoRA: a full-rank warm start, then low-rank cycles.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name not in names:
            continue
        module = load(name)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        heard = one.add_mutually_exclusive_group()
        for option, level, help in (_QUIET, _VERBOSE) if command.verbose else (_QUIET,):
            heard.add_argument(option, action="store_const", dest="heard", const=level, help=help)
        module.add_arguments(one)
        one.epilog = module.EXAMPLES
        one.set_defaults(parser=one, heard=logging.INFO, run=module.run)
        if hasattr(module, "USAGE"):
            one.usage = f"{whole.prog} {name} {module.USAGE}"
    return whole

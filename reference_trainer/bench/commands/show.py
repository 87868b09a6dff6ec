"""The command `bench show`: tables and a picture of measurements on file."""

import argparse
from pathlib import Path

from reference_trainer.bench import options, results

EXAMPLES = """examples:
  python -m reference_trainer bench show runs/bench/*.jsonl --picture bench.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="file that a bench command wrote"
    )
    parser.add_argument("--picture", type=Path, help="PNG to write (default: none)")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if a file is no measurement.
    """
    measurements = [results.read(file) for file in arguments.files]
    return options.shown(measurements, arguments.picture)

"""The command `bench show`: tables and a figure of recorded measurements."""

import argparse
from pathlib import Path

from reference_trainer.bench import options, results

EXAMPLES = """examples:
  python -m reference_trainer bench show runs/bench/*.jsonl --picture bench.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="file written by a bench command"
    )
    parser.add_argument("--picture", type=Path, help="PNG file to write (default: none)")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if a file holds no measurement.
    """
    measurements = [results.read(file) for file in arguments.files]
    return options.shown(measurements, arguments.picture)

"""The command `export`: a run's newest checkpoint as a merged model."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from reference_trainer import options
from reference_trainer.config import Config
from reference_trainer.distributed import open_world
from reference_trainer.errors import UserError
from reference_trainer.export import export

EXAMPLES = """examples:
  python -m reference_trainer export runs/first-run
      the newest complete checkpoint, into runs/first-run/export
"""
USAGE = "[--parallel.OPTION VALUE ...] RUN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("directory", type=Path, help="run directory, such as runs/first-run")
    options.add_options(parser, only="parallel")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Run the command; iterate over what it prints.

    Raises:
        UserError: if an argument is wrong.
    """
    given = {"parallel.replicas": 1, **options.given(arguments)}
    config = _config_of(arguments.directory, given)
    with open_world(config.parallel) as world:
        target = export(config, world)
    yield f"model: {target}"


def _config_of(directory: Path, given: dict[str, object]) -> Config:
    file = directory / "config.yaml"
    if not file.is_file():
        raise UserError(f"{directory} holds no run (no config.yaml): give a run's directory")
    whole = directory.resolve()
    return options.resolve(file, {**given, "runs": str(whole.parent), "name": whole.name})

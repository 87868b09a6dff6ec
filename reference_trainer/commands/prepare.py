"""The command `prepare`: text as memory-mapped shards of tokens."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from reference_trainer import options
from reference_trainer.data.prepare import prepare
from reference_trainer.distributed import world_size
from reference_trainer.errors import UserError
from reference_trainer.files import fresh_directory

EXAMPLES = """examples:
  python -m reference_trainer prepare tokens --data.files 'c4/*.parquet' \\
      --data.tokenizer tokenizer.json
      once; then `train --data.prepared tokens` for as many runs as you like
"""
USAGE = "[--config FILE] [--data.OPTION VALUE ...] OUT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("out", type=Path, help="directory to write, for --data.prepared")
    add(
        "--config",
        type=Path,
        help="YAML file of options; those on the command line take precedence",
    )
    options.add_options(parser, only="data")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Run the command; iterate over what it prints.

    Raises:
        UserError: if an argument is wrong.
    """
    config = options.resolve(arguments.config, options.given(arguments)).data
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists already: give another directory")
    if world_size() > 1:
        raise UserError("`prepare` runs as one process: start it without torchrun")
    if config.prepared:
        raise UserError("`prepare` makes prepared data: give data.files instead of data.prepared")
    with fresh_directory(arguments.out) as made:
        index = prepare(config, made)
    counts = ", ".join(f"{split} {index.tokens(split):,}" for split in index.shards)
    yield f"{arguments.out}: tokens {counts}"
    yield f"use it with --data.prepared {arguments.out}"

"""The command `bench prune`: exact pruning against `torch.quantile`."""

import argparse

from reference_trainer.bench import options
from reference_trainer.bench.restarts import QUANTILE, measure_prune
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import open_world

EXAMPLES = """examples:
  python -m reference_trainer bench prune
      time torch.quantile on 2^24 entries, its largest size, and pruning 99% of 2^25 entries
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    options.add_timing(parser)
    options.add_files(parser, "prune")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    options.refuse_several()
    out = options.output_of(arguments, "prune")
    with open_world(ParallelConfig(device=arguments.device)) as world:
        first = options.head(arguments, "prune", world.device, "seed")
        found = measure_prune(world.device, entries=QUANTILE, repeats=arguments.repeats)
    return options.written([first, *found], out, arguments.picture)

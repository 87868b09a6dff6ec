"""The command `bench restart`: `restart_` against a full-rank optimizer step."""

import argparse

from reference_trainer.bench import options
from reference_trainer.bench.restarts import measure_restart
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import open_world

EXAMPLES = """examples:
  python -m reference_trainer bench restart --model 1.3b --blocks 2
      time merge, redraw and prune of two blocks, and AdamW's step over the same matrices
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    options.add_model(parser)
    parser.add_argument(
        "--blocks",
        type=options.positive,
        default=1,
        help="number of blocks to restart (default: 1)",
    )
    options.add_rank(parser)
    options.add_timing(parser)
    options.add_files(parser, "restart-MODEL")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    options.refuse_several()
    shape = options.shape_of(arguments)
    out = options.output_of(arguments, f"restart-{arguments.model}")
    sizes = {"blocks": arguments.blocks, "rank": arguments.rank}
    with open_world(ParallelConfig(device=arguments.device)) as world:
        first = options.head(arguments, "restart", world.device, "model", "seed", "rank")
        found = measure_restart(shape, world.device, repeats=arguments.repeats, **sizes)
    return options.written([first, *found], out, arguments.picture)

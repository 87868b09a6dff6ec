"""The command `bench checkpoint`: steps while a checkpoint is written, against steps alone."""

import argparse

from reference_trainer.bench import options
from reference_trainer.bench.checkpoints import measure_checkpoints
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import open_world

EXAMPLES = """examples:
  python -m reference_trainer bench checkpoint --model 60m --vocab 256 --tokens 1024 --length 128
      time runs of 20 steps, alternately with a checkpoint at their start and without one
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    options.add_model(parser)
    options.add_batch(parser)
    parser.add_argument(
        "--every", type=options.positive, default=20, help="steps per checkpoint (default: 20)"
    )
    options.add_timing(parser)
    options.add_files(parser, "checkpoint-MODEL")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    options.refuse_several()
    shape = options.shape_of(arguments)
    out = options.output_of(arguments, f"checkpoint-{arguments.model}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_world(ParallelConfig(device=arguments.device)) as world:
        keys = ("model", "seed", "tokens", "length", "vocab")
        first = options.head(arguments, "checkpoint", world.device, *keys)
        found = measure_checkpoints(
            shape,
            world,
            out.parent,
            repeats=arguments.repeats,
            sequences=arguments.tokens // arguments.length,
            length=arguments.length,
            every=arguments.every,
        )
    return options.written([first, *found], out, arguments.picture)

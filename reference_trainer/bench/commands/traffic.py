"""The command `bench traffic`: the bytes a process sends in a step and a restart, by layout."""

import argparse

import torch
from tqdm import tqdm

from reference_trainer.bench import options, results
from reference_trainer.bench.ceilings import CEILINGS
from reference_trainer.bench.communication import measure_traffic
from reference_trainer.bench.computation import computation
from reference_trainer.bench.layouts import Step, layouts, pretended
from reference_trainer.bench.projection import CLUSTERS
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import open_world, world_size
from reference_trainer.errors import UserError
from reference_trainer.logging.console import hidden

EXAMPLES = """examples:
  python -m reference_trainer bench traffic --model 1.3b --processes 4
      count bytes over pretended processes
  torchrun --nproc-per-node 2 -m reference_trainer bench traffic --model 9m
      count bytes over real processes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    options.add_model(parser)
    options.add_batch(parser)
    options.add_rank(parser)
    options.add_processes(parser)
    options.add_files(parser, "traffic-MODEL")


def steps_of(arguments: argparse.Namespace, kind: str) -> tuple[list[Step], int]:
    """Return a step in each layout, and the number of real or pretended processes.

    Raises:
        UserError: if there are fewer than 2 processes, or they do not fill their nodes.
    """
    shape = options.shape_of(arguments)
    count = world_size() if world_size() > 1 else arguments.processes
    if count < 2:
        raise UserError(f"bench {kind} needs 2 processes or more; got {count}: give --processes")
    if count > arguments.node and count % arguments.node:
        raise UserError(
            f"the number of processes must be a multiple of --node {arguments.node}; got {count}"
        )
    sequences = arguments.tokens // arguments.length
    steps = [
        Step(layout, shape, arguments.rank, arguments.length, sequences)
        for layout in layouts(count, arguments.node)
    ]
    return steps, count


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    steps, count = steps_of(arguments, "traffic")
    out = options.output_of(arguments, f"traffic-{arguments.model}")
    keys = ("model", "vocab", "tokens", "length", "rank")
    first = options.head(arguments, "traffic", torch.device("cpu"), *keys)
    first["layers"] = steps[0].shape.layers
    records = []
    if world_size() > 1:
        with open_world(ParallelConfig(device="cpu")) as world:
            records = [measure_traffic(step) for step in steps]
            if not world.first:
                return []
    else:
        for step in tqdm(steps, disable=hidden()):
            with pretended(count):
                records.append(measure_traffic(step))
            gpus = {cluster.gpu: CEILINGS[cluster.gpu] for cluster in CLUSTERS}
            records[-1]["computed"] = computation(step, processes=count, gpus=gpus)
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write([first, *records], out)
    return [results.table([first, *records]), "", f"measurement: {out}"]

"""The command `bench memory`: the peak memory of a process by layout, tracked on fake tensors."""

import argparse
import dataclasses

import torch
from tqdm import tqdm

from reference_trainer.bench import options, results
from reference_trainer.bench.commands.traffic import steps_of
from reference_trainer.bench.layouts import Step
from reference_trainer.bench.tracker import measure_peak, track_peak
from reference_trainer.bench.whole_step import block_kernels
from reference_trainer.config import CHECKPOINTING, ParallelConfig
from reference_trainer.distributed import open_world, world_size
from reference_trainer.logging.console import hidden

EXAMPLES = """examples:
  python -m reference_trainer bench memory --model 7b --processes 8
      track the memory over pretended processes
  torchrun --nproc-per-node 2 -m reference_trainer bench memory --model 9m
      also measure the memory of real processes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    options.add_model(parser)
    options.add_batch(parser)
    options.add_rank(parser)
    options.add_processes(parser)
    options.add_files(parser, "memory-MODEL")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    steps, count = steps_of(arguments, "memory")
    out = options.output_of(arguments, f"memory-{arguments.model}")
    keys = ("model", "vocab", "tokens", "length", "rank")
    first = options.head(arguments, "memory", torch.device("cpu"), *keys)
    first["layers"] = steps[0].shape.layers
    cases = [dataclasses.replace(step, recompute=mode) for step in steps for mode in CHECKPOINTING]
    records = [track_peak(step, processes=count) for step in tqdm(cases, disable=hidden())]
    if world_size() == 1:
        for step, record in zip(cases, records, strict=True):
            record["flops"] = _operations(step)
    else:
        with open_world(ParallelConfig(device="cpu")) as world:
            for step, record in zip(cases, records, strict=True):
                record["measured"] = world.largest(measure_peak(step))
            if not world.first:
                return []
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write([first, *records], out)
    return [results.table([first, *records]), "", f"measurement: {out}"]


def _operations(step: Step) -> int:
    """Return the operations of all blocks in a step, including recomputation."""
    kernels = block_kernels("ours" if step.layout.low_rank else "full", step)
    return step.shape.layers * sum(kernel.times * kernel.flops for kernel in kernels)

"""The command `bench`: choose, measure, write, show."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reference_trainer.bench import results
from reference_trainer.bench.arms import ARMS, COMPILED, parse_arms, usual
from reference_trainer.bench.checkpoints import measure_checkpoints
from reference_trainer.bench.communication import measure_traffic
from reference_trainer.bench.layouts import Step, layouts, pretended
from reference_trainer.bench.measure import count, measure
from reference_trainer.bench.picture import draw
from reference_trainer.bench.restarts import measure_prune, measure_restart
from reference_trainer.bench.subjects import DTYPES, Subject, subjects
from reference_trainer.bench.tracker import measure_peak, track_peak
from reference_trainer.config import ParallelConfig
from reference_trainer.environment import environment
from reference_trainer.errors import UserError
from reference_trainer.model import PRESETS, LlamaShape, preset
from reference_trainer.terminal import hidden
from reference_trainer.world import World, open_world, world_size

_OF_ARMS = ("linear", "block", "model")
LEVELS = (*_OF_ARMS, "restart", "prune", "checkpoint")
EXAMPLES = f"""arms: {", ".join(ARMS)}; each also with {COMPILED} behind it

examples:
  python -m reference_trainer bench --level block --model 1.3b --dtype bf16
      one block at 4096 tokens: full rank, a plain parametrization, two paths, ours, PEFT
  python -m reference_trainer bench --level linear --model 60m --arms full two-paths merged
      the two forms of the linear, over each shape of matrix that the model has
  python -m reference_trainer bench --level model --model 1.3b --dtype mixed --tokens 16384 \\
      --arms full-compiled ours ours-compiled
      the whole model as the trainer runs it; the first arm is what ratios are to
  python -m reference_trainer bench --level model --model 1.3b --count
      floating-point operations only, in a second, without memory for the weights
  python -m reference_trainer bench --comm --model 1.3b --processes 4
      bytes that a process sends in a step and in a restart, by layout, over processes that are
      only pretended; under torchrun, over those that there are
  python -m reference_trainer bench --memory --model 7b --processes 8
      peak memory of a process, by layout, on tensors that have sizes only; under torchrun, beside
      what the processes that there are really take
  python -m reference_trainer bench --level restart --blocks 2
      restart_ against an optimizer step of full rank
  python -m reference_trainer bench --level checkpoint --model 60m --vocab 256 --tokens 1024 \\
      --length 128 --every 20
      steps while a checkpoint is written, against steps without
  python -m reference_trainer bench --show runs/bench/*.jsonl --picture bench.png
      tables and a picture of earlier measurements
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--level", default="block", choices=LEVELS)
    add("--model", default="1.3b", choices=PRESETS, help="shape (default: 1.3b)")
    add("--layers", type=_positive, help="blocks of the model, over the preset's")
    add("--vocab", type=_positive, default=32_000, help="tokens of the model (default: 32000)")
    add("--blocks", type=_positive, default=1, help="of level restart (default: 1)")
    add("--every", type=_positive, default=20, help="steps, of level checkpoint (default: 20)")
    names = usual()
    add("--arms", nargs="+", default=names, help=f"the first is the baseline ({' '.join(names)})")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    dtypes = "bf16: weights too; mixed: fp32 weights, computed in bf16"
    add("--dtype", default="fp32", choices=DTYPES, help=dtypes)
    add("--tokens", type=_positive, default=4096, help="in the batch (default: 4096)")
    add("--length", type=_positive, default=1024, help="tokens of a sequence (default: 1024)")
    add("--rank", type=_positive, default=128, help="of the adapters (default: 128)")
    few = f"timed rounds (default: {results.FEWEST}; with fewer there are no ratios)"
    add("--repeats", type=_positive, default=results.FEWEST, help=few)
    add("--checkpoint-activations", action="store_true", help="recompute blocks (level model)")
    add("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    add("--count", action="store_true", help="count operations on meta tensors, and stop")
    add("--comm", action="store_true", help="count the bytes that a process sends, and stop")
    add("--memory", action="store_true", help="track a process's peak memory, and stop")
    add("--processes", type=_positive, default=8, help="of --comm and --memory (default: 8)")
    add("--node", type=_positive, default=8, help="processes on a node, of --comm (default: 8)")
    add(
        "--out", type=Path, help="JSON lines to write (default: runs/bench/LEVEL-MODEL-DTYPE.jsonl)"
    )
    add("--show", nargs="+", type=Path, help="show these measurements instead of making one")
    add("--picture", type=Path, help="the PNG to write (default: beside --out)")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if something given is wrong; nothing is written then.
    """
    if arguments.show:
        measurements = [results.read(file) for file in arguments.show]
        return _shown(measurements, arguments.picture)
    if world_size() > 1 and not (arguments.comm or arguments.memory):
        raise UserError(
            "`bench` runs as one process, but for --comm and --memory: start it without torchrun"
        )
    shape = preset(arguments.model, vocab_size=arguments.vocab)
    if arguments.layers:
        shape = dataclasses.replace(shape, layers=arguments.layers)
    if arguments.comm or arguments.memory:
        return _of_layouts(arguments, shape)
    arms = parse_arms(arguments.arms)
    out = arguments.out or Path(
        f"runs/bench/{arguments.level}-{arguments.model}-{arguments.dtype}.jsonl"
    )
    if out.exists() and not arguments.count:
        raise UserError(f"{out} exists already: give --out another name")
    if arguments.count and arguments.level not in _OF_ARMS:
        raise UserError(f"--count is of products, of which --level {arguments.level} is not made")
    chosen = _subjects(arguments, shape)
    parallel = ParallelConfig(device=arguments.device)
    if not arguments.count:
        out.parent.mkdir(parents=True, exist_ok=True)
    with open_world(parallel) as world:
        first: dict[str, Any] = {"event": "bench", **environment(world.device)}
        first |= {"level": arguments.level, "model": arguments.model, "seed": arguments.seed}
        records = [first]
        if arguments.level == "restart":
            first |= {"rank": arguments.rank}
            options = {"blocks": arguments.blocks, "rank": arguments.rank}
            records += measure_restart(shape, world.device, repeats=arguments.repeats, **options)
        elif arguments.level == "prune":
            records += measure_prune(world.device, repeats=arguments.repeats)
        elif arguments.level == "checkpoint":
            first |= {key: getattr(arguments, key) for key in ("tokens", "length", "vocab")}
            options = {"sequences": arguments.tokens // arguments.length}
            options |= {"length": arguments.length, "every": arguments.every}
            records += measure_checkpoints(
                shape, world, out.parent, repeats=arguments.repeats, **options
            )
        else:
            keys = ("dtype", "tokens", "length", "rank", "vocab", "checkpoint_activations")
            first |= {key: getattr(arguments, key) for key in keys} | {"layers": shape.layers}
            for subject in chosen:
                records += _measured(subject, arms, arguments, world)
    if arguments.count:
        return [results.table(records)]
    results.write(records, out)
    picture = arguments.picture or out.with_suffix(".png")
    return [*_shown([records], picture), f"measurement: {out}"]


def _of_layouts(arguments: argparse.Namespace, shape: LlamaShape) -> list[str]:
    """Count or track every layout; tokens are of one process."""
    chosen = [name for name in ("count", "comm", "memory") if getattr(arguments, name)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    (kind,) = chosen
    _check_sizes(arguments, shape)
    out = arguments.out or Path(f"runs/bench/{kind}-{arguments.model}.jsonl")
    if out.exists():
        raise UserError(f"{out} exists already: give --out another name")
    keys = ("model", "vocab", "tokens", "length", "rank")
    first: dict[str, Any] = {"event": "bench", **environment(torch.device("cpu")), "level": kind}
    first |= {key: getattr(arguments, key) for key in keys} | {"layers": shape.layers}
    count = world_size() if world_size() > 1 else arguments.processes
    if count < 2:
        raise UserError(f"--{kind} needs 2 processes or more; got {count}")
    if count > arguments.node and count % arguments.node:
        raise UserError(
            f"{count} processes are no whole number of nodes of {arguments.node}: give --node"
        )
    sequences = arguments.tokens // arguments.length
    steps = [
        Step(layout, shape, arguments.rank, arguments.length, sequences)
        for layout in layouts(count, arguments.node)
    ]
    records = []
    if kind == "memory":
        cases = [
            dataclasses.replace(step, recompute=again) for step in steps for again in (False, True)
        ]
        records = [track_peak(step, processes=count) for step in tqdm(cases, disable=hidden())]
        if world_size() > 1:
            with open_world(ParallelConfig(device="cpu")) as world:
                for step, record in zip(cases, records, strict=True):
                    record["measured"] = world.largest(measure_peak(step))
                if not world.first:
                    return []
    elif world_size() > 1:
        with open_world(ParallelConfig(device="cpu")) as world:
            records = [measure_traffic(step) for step in steps]
            if not world.first:
                return []
    else:
        for step in tqdm(steps, disable=hidden()):
            with pretended(arguments.processes):
                records.append(measure_traffic(step))
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write([first, *records], out)
    return [results.table([first, *records]), "", f"measurement: {out}"]


def _subjects(arguments: argparse.Namespace, shape: LlamaShape) -> list[Subject]:
    if arguments.level in (*_OF_ARMS, "checkpoint"):
        _check_sizes(arguments, shape)
    if arguments.level not in _OF_ARMS:
        return []
    sequences = arguments.tokens // arguments.length
    return subjects(
        arguments.level,
        shape,
        dtype=arguments.dtype,
        sequences=sequences,
        length=arguments.length,
    )


def _check_sizes(arguments: argparse.Namespace, shape: LlamaShape) -> None:
    if arguments.tokens % arguments.length:
        raise UserError(
            "--tokens must be a multiple of --length; got "
            f"tokens={arguments.tokens}, length={arguments.length}"
        )
    largest = min(shape.hidden_size, shape.intermediate_size)
    if arguments.rank > largest:
        raise UserError(
            f"--rank must be at most {largest}, the model's width; got {arguments.rank}"
        )


def _measured(
    subject: Subject,
    arms: Sequence[tuple[str, str, bool]],
    arguments: argparse.Namespace,
    world: World,
) -> list[dict[str, Any]]:
    if arguments.count:
        return count(subject, arms, rank=arguments.rank)
    return measure(
        subject,
        arms,
        world,
        rank=arguments.rank,
        repeats=arguments.repeats,
        seed=arguments.seed,
        recompute=arguments.checkpoint_activations,
    )


def _shown(measurements: Sequence[Sequence[dict[str, Any]]], picture: Path | None) -> list[str]:
    lines = [results.table(records) + "\n" for records in measurements]
    enough = all(results.enough(records) for records in measurements)
    if picture and enough:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(measurements, picture)
        lines.append(f"picture: {picture}")
    elif picture:
        lines.append(f"no picture: it needs {results.FEWEST} repeats")
    return lines


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value

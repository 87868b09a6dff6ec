"""The command `bench roofline`: the kernels of a step, and their modeled times on a GPU."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from reference_trainer.bench import markdown, options
from reference_trainer.bench.arms import parse_arms, usual
from reference_trainer.bench.ceilings import CEILINGS, Ceilings
from reference_trainer.bench.kernels import Kernel, together
from reference_trainer.bench.layouts import BF16, FULL, REPLICATE, SHARD, Step
from reference_trainer.bench.whole_step import Part, block_kernels, linear_kernels, step_kernels
from reference_trainer.config import Precision
from reference_trainer.errors import UserError
from reference_trainer.flops import block_matrices
from reference_trainer.logging.console import hidden
from reference_trainer.model.llama import LlamaShape

_LAYOUTS = {"shard": SHARD, "replicate": REPLICATE, "replicate-bf16": BF16}
_SHOWN = 12  # kernels of a block in the table
EXAMPLES = """examples:
  python -m reference_trainer bench roofline --gpu h100 --model 1.3b --micro 8
      model every linear layer, one block and the step, all compiled, as ratios to full rank
  python -m reference_trainer bench roofline --gpu rtx3090 --model 350m --micro 16 --accumulate 4
      model a step of four micro-steps on another GPU
  python -m reference_trainer bench roofline --layout replicate --json roofline.jsonl
      write every kernel with its operations, bytes, time and limiting ceiling as JSON Lines

Torch compiles the blocks into the graphs that it would give to a code generator. The operations
between products are fused by inductor's rules. The rest of the trainer's step runs on fake tensors.
The time of a kernel is that of its arithmetic or of its memory traffic at the measured ceiling,
whichever is longer. The model leaves out gaps between launches, products whose size or shape keeps
them below the ceiling, caches, and the network (see `bench traffic` and `estimate`).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    options.add_model(parser)
    options.add_rank(parser)
    add = parser.add_argument
    add("--gpu", default="h100", choices=CEILINGS, help="GPU model (default: h100)")
    add("--micro", type=options.positive, default=8, help="sequences in a micro-step (default: 8)")
    add(
        "--length", type=options.positive, default=1024, help="tokens in a sequence (default: 1024)"
    )
    add("--accumulate", type=options.positive, default=1, help="micro-steps in a step (default: 1)")
    add("--processes", type=options.positive, default=1, help="number of GPUs (default: 1)")
    layouts = "parallel.layout; replicate-bf16 adds relora.base=bf16 (default: shard)"
    add("--layout", default="shard", choices=_LAYOUTS, help=layouts)
    precisions = [name for name in get_args(Precision) if name != "auto"]
    add(
        "--precision",
        default="bf16",
        choices=precisions,
        help="precision of the computation (default: bf16)",
    )
    names = [*(name for name in usual() if name not in ("full", "dense")), "two-paths"]
    compared = f"arms to compare with full, the baseline (default: {' '.join(names)})"
    add("--arms", nargs="+", default=names, help=compared)
    add("--json", type=Path, metavar="FILE", help="JSON Lines file to write, a line per kernel")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    shape, ceilings = options.shape_of(arguments), CEILINGS[arguments.gpu]
    arms = [arm for _, arm, _ in parse_arms(["full", *(n for n in arguments.arms if n != "full")])]
    if arguments.json and arguments.json.exists():
        raise UserError(f"{arguments.json} exists already: give --json another name")
    if arguments.layout == "replicate-bf16" and arguments.precision == "fp32":
        raise UserError("--precision must be a bf16 one for --layout replicate-bf16; got fp32")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)  # before the long part
    keys = ("gpu", "model", "micro", "length", "accumulate", "processes", "layout", "precision")
    first = options.head(arguments, "roofline", torch.device("cpu"), *keys, "rank", "vocab")
    records = [first | {"layers": shape.layers}]
    for level, subject, arm, parts in tqdm(
        _subjects(arms, shape, arguments),
        total=len(arms) * (len(_matrices(shape)) + 2),
        desc="compiling",
        disable=hidden(),
    ):
        records += _records(level, subject, arm, parts, ceilings)
    _add_ratios(records)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [_title(records[0]), *_tables(records, ceilings)]


def _subjects(arms: Sequence[str], shape: LlamaShape, arguments: argparse.Namespace) -> Any:
    for arm in arms:
        layout = (
            FULL if arm == "full" else replace(_LAYOUTS[arguments.layout], merged=arm == "ours")
        )
        sizes = (arguments.rank, arguments.length, arguments.micro)
        step = Step(layout, shape, *sizes, precision=arguments.precision)
        for matrix in _matrices(shape):
            name = "linear {} x {}".format(*matrix)
            yield "linear", name, arm, [Part("linear", linear_kernels(arm, step, matrix))]
        yield "block", "block", arm, [Part("block", block_kernels(arm, step))]
        numbers = {"processes": arguments.processes, "micro_steps": arguments.accumulate}
        yield "step", "whole step", arm, step_kernels(arm, step, **numbers)


def _matrices(shape: LlamaShape) -> list[tuple[int, int]]:
    return list(dict.fromkeys(block_matrices(shape)))


def _records(
    level: str, subject: str, arm: str, parts: Sequence[Part], ceilings: Ceilings
) -> list[dict[str, Any]]:
    kernels = [kernel for part in parts for kernel in part.kernels]
    whole: dict[str, Any] = {"event": "arm", "level": level, "subject": subject, "arm": arm}
    whole["seconds"] = sum(map(ceilings.seconds, kernels))
    whole["kernels"] = sum(kernel.times for kernel in kernels)
    whole["bytes"] = sum(kernel.times * kernel.moved for kernel in kernels)
    whole["flops"] = sum(kernel.times * kernel.flops for kernel in kernels)
    whole["parts"] = {part.name: sum(map(ceilings.seconds, part.kernels)) for part in parts}
    lines = [
        {"event": "kernel", "subject": subject, "arm": arm, "part": part.name}
        | _kernel(kernel, ceilings)
        for part in parts
        for kernel in together(part.kernels)
    ]
    return [whole, *lines]


def _kernel(kernel: Kernel, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "kernel": kernel.name,
        "times": kernel.times,
        "flops": kernel.flops,
        "read": kernel.read,
        "written": kernel.written,
        "seconds": ceilings.seconds(kernel),
        "bound": ceilings.bound(kernel),
    }


def _add_ratios(records: list[dict[str, Any]]) -> None:
    arms = [record for record in records if record["event"] == "arm"]
    full = {record["subject"]: record["seconds"] for record in arms if record["arm"] == "full"}
    for record in arms:
        record["ratio"] = record["seconds"] / full[record["subject"]]


def _title(first: dict[str, Any]) -> str:
    return (
        f"{first['model']} ({first['layers']} blocks, rank {first['rank']}), {first['processes']} "
        f"x {first['gpu']}, {first['accumulate']} x {first['micro']} sequences of "
        f"{first['length']}, {first['precision']}, layout {first['layout']}; compiled, by "
        "ceilings; torch " + str(first["torch"])
    )


def _tables(records: Sequence[dict[str, Any]], ceilings: Ceilings) -> list[str]:
    arms = [record for record in records if record["event"] == "arm"]
    lines = []
    for subject in dict.fromkeys(record["subject"] for record in arms):
        own = [record for record in arms if record["subject"] == subject]
        parts = list(own[0]["parts"]) if len(own[0]["parts"]) > 1 else []
        header = ["arm", "time", "ratio", "kernels", "GB", "TFLOP", *parts]
        rows = [
            [
                one["arm"],
                _time(one["seconds"]),
                f"{one['ratio']:.3f}",
                f"{one['kernels']:,}",
                f"{one['bytes'] / 1e9:,.4g}",
                f"{one['flops'] / 1e12:,.4g}",
                *(_time(one["parts"][part]) for part in parts),
            ]
            for one in own
        ]
        lines += ["", f"**{subject}**", "", markdown.table(header, rows)]
    return [*lines, *_longest(records, arms[-1]["arm"])]


def _longest(records: Sequence[dict[str, Any]], arm: str) -> list[str]:
    """Return a table of the slowest kernels of a block."""
    name = "ours" if any(record.get("arm") == "ours" for record in records) else arm
    own = [r for r in records if r["event"] == "kernel" and r["arm"] == name]
    longest = sorted((r for r in own if r["subject"] == "block"), key=lambda r: -r["seconds"])
    rows = [
        [r["kernel"], str(r["times"]), _time(r["seconds"]), r["bound"]] for r in longest[:_SHOWN]
    ]
    table = markdown.table(["kernel", "times", "time", "bound"], rows)
    return ["", f"**a block's kernels, {name}**", "", table]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-2 else f"{seconds * 1e6:,.4g} us"

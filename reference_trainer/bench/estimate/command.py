"""The command `estimate`: whether a run fits, how many sequences fit, in which layout, how fast."""

import argparse
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from reference_trainer.bench import markdown, results
from reference_trainer.bench.estimate.gpus import GPUS, GiB
from reference_trainer.bench.estimate.row import PHASES, Row, row_of
from reference_trainer.bench.layouts import (
    FULL,
    LAYOUTS,
    Step,
)
from reference_trainer.config import CHECKPOINTING, Precision
from reference_trainer.environment import environment
from reference_trainer.errors import UserError
from reference_trainer.logging.console import hidden
from reference_trainer.model.llama import PRESETS, LlamaShape, preset

KEPT_FREE = 0.1  # share of the memory for the context, NCCL's buffers and fragmentation
_ENTRY = {"fp32": 4, "bf16": 4, "pure-bf16": 2}  # bytes of a trained entry and of its moments
# Number of moments, and bytes per entry (None: as in _ENTRY); 8-bit blocks of 256 share a scale.
_OPTIMIZERS = {"adamw": (2, None), "adamw8bit": (2, 1 + 4 / 256), "momentum": (1, None)}
EXAMPLES = """examples:
  python -m reference_trainer estimate --model 1.3b --world-size 8
      estimate both phases on eight H100s, in all layouts, for each kind of activation checkpointing
  python -m reference_trainer estimate --model 1.3b --world-size 2 --gpu rtx3090 --length 512 \\
      --precision pure-bf16
      estimate whether two GPUs of 24 GB are enough
  python -m reference_trainer estimate --model 7b --world-size 64 --optimizer adamw8bit
      estimate your own trainer with 8-bit moments (this trainer uses AdamW)

Memory is tracked on fake tensors after every operation of a training step and includes accumulated
gradients. It is tracked with three and with four blocks, because each further block adds the same.
A tenth of the GPU's memory is kept free. Times come from a model: kernels at measured ceilings
(`bench roofline`), which a GPU reaches at best, and bytes over links. The lower time hides all
communication behind computation, the upper time hides none.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--model", default="1.3b", choices=PRESETS, help="model shape (default: 1.3b)")
    add("--vocab", type=int, default=32_000, help="vocabulary size (default: 32000)")
    add("--world-size", type=int, default=8, help="number of GPUs (default: 8)")
    add("--gpu", default="h100", choices=GPUS, help="GPU model (default: h100)")
    add("--sequences", type=int, help="sequences in a step, over all GPUs (default: 64 per GPU)")
    add("--length", type=int, default=1024, help="tokens in a sequence (default: 1024)")
    add("--rank", type=int, default=128, help="rank of the sites (default: 128)")
    precisions = [name for name in get_args(Precision) if name != "auto"]
    add(
        "--precision",
        default="bf16",
        choices=precisions,
        help="parallel.precision (default: bf16)",
    )
    add(
        "--optimizer",
        default="adamw",
        choices=_OPTIMIZERS,
        help="optimizer, which sets the size of the moments (default: adamw)",
    )
    add("--out", type=Path, help="JSON Lines file to write")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if an option is invalid; nothing is written in that case.
    """
    shape, sequences = _checked(arguments)
    memory, cluster = GPUS[arguments.gpu]
    room = (1 - KEPT_FREE) * memory
    work = [
        Step(layout, shape, arguments.rank, arguments.length, 1, recompute, arguments.precision)
        for layout in LAYOUTS
        if arguments.precision != "fp32" or layout.base == "keep"
        for recompute in CHECKPOINTING
    ]
    options = {"processes": arguments.world_size, "moments": _share(arguments)}
    workers = min(2, os.cpu_count() or 1)  # each takes half a GB
    mine = sequences // arguments.world_size
    options |= {"mine": mine, "room": room}
    with ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C ends them without a traceback of each
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as pool:
        found = pool.map(partial(row_of, cluster=cluster, **options), work)
        rows = list(tqdm(found, desc="tracking", total=len(work), disable=hidden()))
    if arguments.out:
        keys = ("model", "vocab", "world_size", "gpu", "length", "rank", "precision", "optimizer")
        first: dict[str, Any] = {"event": "estimate", **environment(torch.device("cpu"))}
        first |= {key: getattr(arguments, key) for key in keys} | {"sequences": sequences}
        lines = [first, *({"event": "row", **asdict(row)} for row in rows)]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        results.write(lines, arguments.out)
    return [_head(arguments, shape, sequences, room), "", table(rows), "", *advice(rows, room)]


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of all rows."""
    header = ["phase", "checkpointing", "weights", "moments", "peak"]
    return markdown.table([*header, "sequences at once", "sent", "step"], map(_cells, rows))


def _cells(row: Row) -> list[str]:
    low, high = row.seconds or (0, 0)
    return [
        row.phase,
        row.recompute,
        f"{row.weights / GiB:.2f} GiB",
        f"{row.optimizer / GiB:.2f} GiB",
        f"{row.peak / GiB:.2f} GiB",
        f"{row.micro} (of {row.fits} that fit)" if row.micro else "none fits",
        f"{row.sent / 1e9:.1f} GB" if row.micro else "",
        f"{low:.2f} to {high:.2f} s" if row.micro else "",
    ]


def advice(rows: Sequence[Row], room: float) -> list[str]:
    """Return whether the run fits, and the options of the fastest plan that fits."""
    fitting = [row for row in rows if row.micro]
    plans = [
        (warm, low)
        for warm in fitting
        for low in fitting
        if warm.phase == PHASES[FULL] != low.phase and warm.recompute == low.recompute
    ]
    if not plans:
        least = {row.phase: min(r.peak for r in rows if r.phase == row.phase) for row in rows}
        needs = ", ".join(f"{phase} {peak / GiB:.1f}" for phase, peak in least.items())
        return [
            f"It does not fit: one sequence at a time needs {needs} GiB; {room / GiB:.1f} are "
            "available. Use more GPUs, shorter sequences, or --precision pure-bf16."
        ]
    # A quarter of the steps is the warm start, as in the paper.
    warm, low = min(plans, key=lambda plan: sum(plan[0].seconds) + 3 * sum(plan[1].seconds))
    micro = min(warm.micro, low.micro)
    share = sum(low.seconds) / sum(warm.seconds)
    saved = (warm.peak_of(micro) - low.peak_of(micro)) / GiB
    apart = ""
    if warm.micro != low.micro:  # batch.micro is the same for both phases
        apart = f" (with {low.micro} sequences at once; {warm.micro} in the warm start)"
    reduce = "micro-step" if "micro-step" in (warm.reduce, low.reduce) else "step"
    return [
        f"It fits. The fastest plan: --batch.micro {micro} --parallel.layout {low.layout} "
        f"--parallel.reduce {reduce} "
        f"--relora.base {low.base} "
        f"--parallel.checkpoint_activations {low.recompute}",
        f"Then a step of ReLoRA takes {share:.2f} of the time of a step of the warm start{apart}, "
        f"and {abs(saved):.1f} GiB {'less' if saved >= 0 else 'more'} memory.",
    ]


def _checked(arguments: argparse.Namespace) -> tuple[LlamaShape, int]:
    for name in ("vocab", "world_size", "length", "rank"):
        if getattr(arguments, name) < 1:
            shown = name.replace("_", "-")
            raise UserError(f"--{shown} must be 1 or more; got {getattr(arguments, name)}")
    shape, world = preset(arguments.model, vocab_size=arguments.vocab), arguments.world_size
    if arguments.rank > shape.hidden_size:
        raise UserError(
            f"--rank must be at most {shape.hidden_size}, the model's width; got {arguments.rank}"
        )
    sequences = 64 * world if arguments.sequences is None else arguments.sequences
    if sequences < 1 or sequences % world:
        raise UserError(f"--sequences must be a multiple of --world-size {world}; got {sequences}")
    _, cluster = GPUS[arguments.gpu]
    if world > cluster.node and world % cluster.node:
        raise UserError(
            f"--world-size must be a multiple of {cluster.node}, the GPUs on a node; got {world}"
        )
    if arguments.out and arguments.out.exists():
        raise UserError(f"{arguments.out} exists already: give --out another name")
    return shape, sequences


def _share(arguments: argparse.Namespace) -> float:
    """Return the size of the optimizer's moments as a ratio to AdamW's."""
    entry = _ENTRY[arguments.precision]
    count, own = _OPTIMIZERS[arguments.optimizer]
    return count * (own or entry) / (2 * entry)


def _head(arguments: argparse.Namespace, shape: LlamaShape, sequences: int, room: float) -> str:
    return (
        f"{arguments.model} ({shape.layers} blocks of {shape.hidden_size}, {shape.vocab_size} "
        f"tokens), {arguments.world_size} x {arguments.gpu}, {sequences} sequences of "
        f"{arguments.length} a step, rank {arguments.rank}, {arguments.precision}, "
        f"{arguments.optimizer}: {room / GiB:.1f} GiB for tensors on each"
    )

"""The command `estimate`: will it fit, how many sequences at once, which layout, how fast."""

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

KEPT_FREE = 0.1  # of the memory: the context, NCCL's buffers, the allocator's fragments
_ENTRY = {"fp32": 4, "bf16": 4, "pure-bf16": 2}  # bytes of a trained entry and of its moments
# Moments, and bytes an entry of each beside those of fp32 or bf16: 8 bits have a scale a block.
_OPTIMIZERS = {"adamw": (2, None), "adamw8bit": (2, 1 + 4 / 256), "momentum": (1, None)}
EXAMPLES = """examples:
  python -m reference_trainer estimate --model 1.3b --world-size 8
      both phases on eight H100, in both layouts, by what each block keeps of its activations
  python -m reference_trainer estimate --model 1.3b --world-size 2 --gpu rtx3090 --length 512 \\
      --precision pure-bf16
      whether two of 24 GB will do
  python -m reference_trainer estimate --model 7b --world-size 64 --optimizer adamw8bit
      for a trainer of your own that keeps moments in 8 bits (this one has AdamW)

Memory is what tensors take after every operation of a training step, the gradients that several
micro-steps accumulate included, tracked on tensors that have sizes only, with three blocks and with
four: each further one adds the same. A tenth of a GPU is kept free. Times are a model: what kernels
take at measured ceilings (`bench roofline`), which a GPU at best reaches, and bytes over links; the
lower figure hides all communication behind computation, the upper one none.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--model", default="1.3b", choices=PRESETS, help="model shape (default: 1.3b)")
    add("--vocab", type=int, default=32_000, help="vocabulary size (default: 32000)")
    add("--world-size", type=int, default=8, help="number of GPUs (default: 8)")
    add("--gpu", default="h100", choices=GPUS, help="GPU model (default: h100)")
    add("--sequences", type=int, help="sequences in a step, over all GPUs (default: 64 a GPU)")
    add("--length", type=int, default=1024, help="tokens in a sequence (default: 1024)")
    add("--rank", type=int, default=128, help="rank of the low-rank phase (default: 128)")
    precisions = [name for name in get_args(Precision) if name != "auto"]
    add(
        "--precision",
        default="bf16",
        choices=precisions,
        help="precision, as parallel.precision (default: bf16)",
    )
    add(
        "--optimizer",
        default="adamw",
        choices=_OPTIMIZERS,
        help="optimizer, for its moments (default: adamw)",
    )
    add("--out", type=Path, help="JSON lines to write")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the command and return what it prints.

    Raises:
        UserError: if something given is wrong; nothing is written then.
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
    workers = min(2, os.cpu_count() or 1)  # half a GB each
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
    """Return the Markdown table."""
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
    """Return whether it fits, and the options of the fastest way in which it does."""
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
            f"It does not fit: a sequence at a time takes {needs} GiB of {room / GiB:.1f}. "
            "Give more GPUs, shorter sequences, or --precision pure-bf16."
        ]
    # A quarter of the steps is the warm start, as in the paper.
    warm, low = min(plans, key=lambda plan: sum(plan[0].seconds) + 3 * sum(plan[1].seconds))
    micro = min(warm.micro, low.micro)
    share = sum(low.seconds) / sum(warm.seconds)
    saved = (warm.peak_of(micro) - low.peak_of(micro)) / GiB
    apart = ""
    if warm.micro != low.micro:  # there is one batch.micro for both
        apart = f" (with {low.micro} at once, and {warm.micro} in the warm start)"
    reduce = "micro-step" if "micro-step" in (warm.reduce, low.reduce) else "step"
    return [
        f"It fits. The fastest way: --batch.micro {micro} --parallel.layout {low.layout} "
        f"--parallel.reduce {reduce} "
        f"--relora.base {low.base} "
        f"--parallel.checkpoint_activations {low.recompute}",
        f"Then a step of ReLoRA takes {share:.2f} of one of the warm start{apart}, and "
        f"{abs(saved):.1f} GiB {'less' if saved >= 0 else 'more'}.",
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
            f"--world-size must be a multiple of the GPUs of a node, {cluster.node}; got {world}"
        )
    if arguments.out and arguments.out.exists():
        raise UserError(f"{arguments.out} exists already: give --out another name")
    return shape, sequences


def _share(arguments: argparse.Namespace) -> float:
    """Return the bytes of the optimizer's moments, as a share of AdamW's."""
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

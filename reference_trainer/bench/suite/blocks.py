"""Stage 4: forward and backward of a block, at full rank and with ours, eager and compiled."""

from collections.abc import Callable

import torch
from torch import nn

import relora_core as relora
from reference_trainer.bench.layouts import FULL, SHARD, Layout
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes
from reference_trainer.bench.suite.timing import medians
from reference_trainer.bench.whole_step import as_arm_
from reference_trainer.bench.workloads import draw_weights_
from reference_trainer.model.llama import Block, rotary_table

ARMS = {"full": FULL, "ours": SHARD, "two-paths": SHARD}


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Time all arms in alternation, at each micro-batch size."""
    for micro in sizes.micros:
        torch.compiler.reset()  # else the second size would compile with dynamic shapes
        runs, baselines = {}, {}
        for arm, layout in ARMS.items():
            for compiled in (False, True):
                name = named(arm, micro, compiled)
                runs[name] = _backward(sizes, arm, layout, micro, device, compiled=compiled)
                baselines[name] = named("full", micro, compiled)
        for name, seconds in medians(runs, device, repeats=sizes.repeats).items():
            report.measured(name, seconds, baseline=baselines[name])


def named(arm: str, micro: int, compiled: bool) -> str:
    """Return the name of a block in the results."""
    return f"block, {micro} sequences, {arm}, {'compiled' if compiled else 'eager'}"


def _backward(
    sizes: Sizes, arm: str, layout: Layout, micro: int, device: torch.device, *, compiled: bool
) -> Callable[[], object]:
    with torch.device("meta"):
        block: nn.Module = Block(sizes.shape)
    dtype = as_arm_(block, arm, sizes.step(layout, micro))
    block.to_empty(device=device)
    draw_weights_(block, sizes.shape)
    if arm == "ours":
        relora.refresh_merged_(block)
    if compiled:
        block.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    table = rotary_table(sizes.length, sizes.shape, device)
    size = (micro, sizes.length, sizes.shape.hidden_size)
    x = torch.randn(size, dtype=dtype, device=device, requires_grad=True)
    g = torch.randn(size, dtype=dtype, device=device)

    def backward() -> None:
        block(x, *table).backward(g)
        x.grad = None
        for p in block.parameters():
            p.grad = None

    return backward

"""The timing of arms in alternation in one process, so that disturbances affect all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from reference_trainer.bench.arms import ARMS
from reference_trainer.bench.memory import kept_bytes, peak_bytes, state_bytes
from reference_trainer.bench.workloads import Subject
from reference_trainer.config import BaseLayout, Checkpointing
from reference_trainer.distributed import World
from reference_trainer.flops import counted_flops
from reference_trainer.logging.console import hidden

WARM_UPS = 2


Timed = Callable[[], dict[str, float]]
"""A function that runs something and returns the seconds of each of its parts by name."""


def interleaved(
    timed: Mapping[str, Timed], repeats: int, description: str
) -> dict[str, list[dict[str, float]]]:
    """Run each function once per round and return its seconds; each round starts one later."""
    names = list(timed)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    total = (WARM_UPS + repeats) * len(names)
    with tqdm(total=total, desc=description, unit="run", disable=hidden()) as bar:
        for number in range(WARM_UPS + repeats):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                parts = timed[name]()
                if number >= WARM_UPS:
                    seconds[name].append(parts)
                bar.update()
    return seconds


def measure(
    subject: Subject,
    arms: Sequence[tuple[str, str, bool]],
    world: World,
    *,
    rank: int,
    repeats: int,
    seed: int,
    recompute: Checkpointing,
    layout: BaseLayout,
) -> list[dict[str, Any]]:
    """Return a record for each arm: seconds of each repeat, operations and memory.

    Args:
        subject: workload to run.
        arms: triples (name, arm, whether it is compiled).
        world: world of one process.
        rank: rank of the low-rank arms.
        repeats: number of timed rounds.
        seed: seed of the weights and inputs.
        recompute: `parallel.checkpoint_activations` (level "model").
        layout: `parallel.layout` (level "model").
    """
    timed: dict[str, Timed] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, arm, compiled in tqdm(arms, desc=f"{subject.name}: building", disable=hidden()):
        prepare_ = _preparing(arm, rank)
        torch.manual_seed(seed)
        work = subject.work(prepare_, world, compiled=compiled, recompute=recompute, layout=layout)
        trained = [p for p in work.module.parameters() if p.requires_grad]
        # Every arm has torch's fastest AdamW, the fused one; full rank benefits most from it.
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        work.backward()
        optimizer.step()
        state = state_bytes(work.module, optimizer)
        optimizer.zero_grad()
        records[name] = _counted(subject, name, arm, rank) | {
            "trained_parameters": sum(p.numel() for p in trained),
            "peak_bytes": state + peak_bytes(work.backward, world.device),
        }
        if recompute != "selective":  # it keeps tensors unknown to autograd's hooks
            records[name]["kept_bytes"] = kept_bytes(work.module, work.forward)
        optimizer.zero_grad()
        timed[name] = _step(work.backward, optimizer, world.device)

    for name, seconds in interleaved(timed, repeats, subject.name).items():
        for part in ("backward", "step"):
            records[name][f"{part}_seconds"] = [parts[part] for parts in seconds]
    return list(records.values())


def count(
    subject: Subject, arms: Sequence[tuple[str, str, bool]], *, rank: int
) -> list[dict[str, Any]]:
    """Return a record for each arm that holds only its operations."""
    return [_counted(subject, name, arm, rank) for name, arm, _ in arms]


def _counted(subject: Subject, name: str, arm: str, rank: int) -> dict[str, Any]:
    flops = counted_flops(subject.on_meta(_preparing(arm, rank)).backward)
    return {"event": "arm", "subject": subject.name, "arm": name, "flops": flops}


def _preparing(arm: str, rank: int) -> Callable[[nn.Module], None]:
    return lambda module: ARMS[arm](module, rank)


def _step(
    backward: Callable[[], None], optimizer: torch.optim.Optimizer, device: torch.device
) -> Timed:
    def run() -> dict[str, float]:
        began = now(device)
        backward()
        middle = now(device)
        optimizer.step()
        done = now(device)
        optimizer.zero_grad()
        return {"backward": middle - began, "step": done - began}

    return run


def now(device: torch.device) -> float:
    """Return the time after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""The memory of a process in a training step, tracked on fake tensors."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grad_norm_

import relora_core as relora
from reference_trainer.bench.layouts import Step, fill_, laid_out, pretended, world_of
from reference_trainer.bench.memory import peak_bytes, state_bytes
from reference_trainer.config import Reduce
from reference_trainer.model.llama import Llama
from reference_trainer.train import forward_backward
from relora_core._torch_private import parameter_groups
from relora_core.distributed.local import local

_BLOCK = re.compile(r"\.layers\.\d+$")
_LOSS = re.compile(r"\.loss$")


@dataclass(frozen=True)
class Tracked:
    """The memory of a process's tensors, in bytes.

    Args:
        weights: bytes of all parameters.
        optimizer: bytes of AdamW's moments.
        parts: bytes of all tensors after each operation, split into parts. The first part ends at
            the first block. Each block's forward and each block's backward begins a new part. The
            last part is one number, the peak of clipping and the optimizer's step. The loss is also
            one number, because its number of chunks depends on the tokens.
    """

    weights: int
    optimizer: int
    parts: list[list[int]]

    @property
    def peak(self) -> int:
        """The largest number in all parts."""
        return max(map(max, self.parts))


def track(step: Step, *, processes: int) -> Tracked:
    """Return the memory of a training step after the first.

    Only tensors count. The allocator's fragments, a device's context and communication buffers, and
    the temporaries of optimizers that work on all tensors at once are left out.

    Args:
        step: training step to track.
        processes: number of processes.
    """
    with pretended(processes):
        world = world_of(step.layout)
        memory = FakeTensorMode(allow_non_fake_inputs=True)
        stage = laid_out(step, world, memory=memory)

        def update() -> None:
            # With foreach=True, sharded tensors would be tracked at their full sizes.
            clip_grad_norm_(stage.parameters.values(), 1.0, foreach=False)
            stage.optimizer.step()
            stage.optimizer.zero_grad()

        with memory:
            for p in stage.parameters.values():
                p.grad = torch.zeros_like(p)
            update()  # the first call of each DTensor operation computes shapes at full size
            states = [t for state in stage.optimizer.state.values() for t in state.values()]
            parts_of_batch = step.parts()
            if step.accumulates:
                _earlier(stage.model, parts_of_batch[0], step.reduce)
            tracker = _Timeline(stage.model, stage.optimizer)
            held = _unowned(stage.model)
            if step.accumulates:
                held += _accumulated(stage.model)
            tracker.track_inputs((parts_of_batch, *held))
            with tracker:
                forward_backward(stage.model, parts_of_batch, world)
                *parts, last = tracker.parts
                count = len(last)
                update()
            weights = sum(local(p).nbytes for p in stage.model.parameters())
            parts += [last[:count], [max(last[count:])]]
            return Tracked(weights, sum(local(t).nbytes for t in states), parts)


def _unowned(model: nn.Module) -> list[Tensor]:
    """Return the bases that FSDP2 does not own, which the tracker would miss."""
    sites = (site for _, site in relora.low_rank_sites(model))
    return [local(s.weight) for s in sites if s.low_rank.merged_copy is not None]


def _earlier(model: Llama, part: Tensor, reduce: Reduce) -> None:
    """Run a micro-step before the last one of its step."""
    model.set_requires_gradient_sync(reduce == "micro-step")  # type: ignore[operator]
    model(part[:, :-1], part[:, 1:]).backward()


def _accumulated(model: nn.Module) -> list[Tensor]:
    """Return the gradients that FSDP2 has accumulated, sharded or not."""
    found = [local(p.grad) for p in model.parameters() if p.grad is not None]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in parameter_groups(module._get_fsdp_state()):
                for parameter in group.fsdp_params:
                    kept = parameter.unsharded_accumulated_grad, parameter.unsharded_param.grad
                    found += [whole for whole in kept if whole is not None]
    return found


def measure_peak(step: Step) -> int:
    """Return the peak of a real step on CPUs in the current process group, in bytes.

    The peak is the memory before the step plus the most that the step adds, as the allocator of
    this process reports it. It is the lowest of eight steps, because gloo's threads free some
    memory late in about every fourth step.
    """
    world = world_of(step.layout)
    stage = laid_out(step, world)
    fill_(stage.model)
    parts = step.parts(2 if step.accumulates else 1)

    def take() -> None:
        forward_backward(stage.model, parts, world, step.reduce)
        clip_grad_norm_(stage.parameters.values(), 1.0)
        stage.optimizer.step()
        stage.optimizer.zero_grad()

    take()
    standing = state_bytes(stage.model, stage.optimizer)
    return standing + min(peak_bytes(take, torch.device("cpu")) for _ in range(8))


def track_peak(step: Step, *, processes: int) -> dict[str, Any]:
    """Return the record of a step's peak, as tracked by `track`."""
    found = track(step, processes=processes)
    return {
        "event": "peak",
        "arm": step.layout.name,
        "processes": processes,
        "recompute": step.recompute,
        "weights": found.weights,
        "optimizer": found.optimizer,
        "total": found.peak,
    }


# Torch has no types for the tracker.
class _Timeline(FSDPMemTracker):  # type: ignore[no-untyped-call]
    """A tracker that records the total memory after each operation, by block."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.parts: list[list[int]] = [[]]
        self._begun: set[tuple[bool, str]] = set()
        self._of_loss = False

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules = self._mod_tracker
        for name in filter(_BLOCK.search, modules.parents):
            place = modules.is_bw, name
            if place not in self._begun:
                self._begun.add(place)
                self.parts.append([])
        now = self._curr_mem_snap.values()  # get_tracker_snapshot() copies it each time
        total = sum(parts["Total"] for parts in now)
        of_loss = not modules.is_bw and any(map(_LOSS.search, modules.parents))
        if of_loss and self._of_loss:
            self.parts[-1][-1] = max(self.parts[-1][-1], total)
        else:
            self.parts[-1].append(total)
        self._of_loss = of_loss

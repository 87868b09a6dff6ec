"""Stage 5: the trainer's own step on the full model, one layout per process."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

import relora_core as relora
from reference_trainer.bench.layouts import FULL, REPLICATE, SHARD, Step, laid_out
from reference_trainer.bench.measure import now
from reference_trainer.bench.memory import peak_bytes, state_bytes
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes
from reference_trainer.bench.workloads import draw_weights_
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import World, open_world
from reference_trainer.logging.progress import graphs
from reference_trainer.train import forward_backward

LAYOUTS = {"full": FULL, "shard": SHARD, "replicate": REPLICATE}
_SHOWN = 20  # kernels of a profile
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run(report: Report, sizes: Sizes, device: torch.device, arm: str) -> None:
    """Time a step at each micro-batch size, profile it, and measure its peak memory."""
    parallel = ParallelConfig("cuda" if device.type == "cuda" else "cpu", "bf16")
    with open_world(parallel) as world:
        for micro in sizes.micros:
            _measure(report, sizes.step(LAYOUTS[arm], micro), world, arm, sizes.repeats)
            gc.collect()  # FSDP2's hooks and the model form reference cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()


def named(arm: str, micro: int) -> str:
    """Return the name of a step in the results."""
    return f"step, {micro} sequences, {arm}"


def _measure(report: Report, step: Step, world: World, arm: str, repeats: int) -> None:
    name, device = named(arm, step.sequences), world.device
    before = graphs()
    stage = laid_out(step, world)
    draw_weights_(stage.model, step.shape)
    relora.refresh_merged_(stage.model)
    parts = torch.randint(0, step.shape.vocab_size, step.parts().shape)
    if device.type == "cuda":
        parts = parts.pin_memory()

    def take() -> None:
        loss = forward_backward(stage.model, parts, world)
        norm = clip_grad_norm_(stage.parameters.values(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        world.any(~(loss + norm).isfinite())  # the trainer synchronizes here too
        stage.optimizer.step()
        stage.optimizer.zero_grad()

    began = now(device)
    take()
    report.measured(f"{name}: the first, compilation included", now(device) - began)
    take()
    seconds = []
    for _ in range(repeats):
        began = now(device)
        take()
        seconds.append(now(device) - began)
    middle = sorted(seconds)[len(seconds) // 2]
    report.measured(name, middle, baseline=named("full", step.sequences), repeats=seconds)
    standing = state_bytes(stage.model, stage.optimizer)
    report.measured(f"{name}: peak", standing + peak_bytes(take, device), "bytes")
    report.measured(f"{name}: graphs", graphs() - before, "graphs")
    report.write("profile", what=name, **_profiled(take, device))


def _profiled(take: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Return the launches, waits, copies and slowest kernels of one step."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        take()
    events = {event.key: event for event in profiler.key_averages()}
    times = {
        key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for key, event in events.items()
        if not cuda or event.device_type == DeviceType.CUDA
    }
    longest = sorted(times, key=lambda key: -times[key])[:_SHOWN]
    return {
        "launches": sum(events[key].count for key in _LAUNCHES if key in events),
        "waits": {key: events[key].count for key in _WAITS if key in events},
        "copies": {key: event.count for key, event in events.items() if key.startswith("Memcpy")},
        "kernels": {key[:120]: [events[key].count, times[key]] for key in longest},
    }

"""The memory of a run: tensors that autograd keeps for backward, and the allocator's peak."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from relora_core.distributed.local import local


def kept_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps after `forward`, without parameters.

    Tensors that share memory count once. Tensors that FSDP has gathered and freed again count as
    zero, because autograd holds them without their memory.
    """
    own = {_storage(p) for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in own:
            kept[storage] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


def state_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of parameters and optimizer state on this process."""
    tensors: list[Tensor] = list(module.parameters())
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(local(tensor).nbytes for tensor in tensors)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of allocated memory during `run`, minus the memory allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else kineto logs each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def _storage(tensor: Tensor) -> int:
    return int(local(tensor).untyped_storage()._cdata)

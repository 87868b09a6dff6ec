"""The timing of code on a device, with the GPU's caches flushed before each run."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

_SCRUBBED = 2**28  # bytes, several times the largest cache
WARM_UPS = 3


def medians(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int
) -> dict[str, float]:
    """Return the median seconds of each function; the functions run in alternation.

    On CUDA, the time is between two events on the stream. Earlier work hides the launches of a few
    kernels, as in a training step.

    Args:
        runs: functions to time, by name.
        device: device on which they run.
        repeats: number of timed rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    scrub = None
    if device.type == "cuda":
        scrub = torch.empty(_SCRUBBED, dtype=torch.uint8, device=device)
    for number in range(WARM_UPS + repeats):
        for name, run in runs.items():
            taken = _on_host(run) if scrub is None else _on_stream(run, scrub)
            if number >= WARM_UPS:
                seconds[name].append(taken)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _on_host(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _on_stream(run: Callable[[], object], scrub: torch.Tensor) -> float:
    # Torch has no types for events.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    scrub.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3

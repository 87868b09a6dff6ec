"""Times of code on a device, with its caches emptied before each."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

_SCRUBBED = 2**28  # bytes, several times the largest cache
WARM_UPS = 3


def medians(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int
) -> dict[str, float]:
    """Return the median seconds of each, all run in turn.

    On CUDA they are between two events on the stream: launches of a few kernels are hidden by the
    work that lies before, as in a step.

    Args:
        runs: by name.
        device: where.
        repeats: timed rounds.
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
    # Torch has no types for it.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    scrub.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3

"""The most memory that this process has held."""

import os
import resource
import sys
from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak memory since this object was made: allocated on the GPU, or resident on the host.

    Where /proc cannot reset it (macOS, some sandboxes), it is the peak since the process began.

    Args:
        device: the device that the process computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif os.access(_FORGET, os.W_OK):
            _FORGET.write_text("5")  # resets the peak: see proc(5)

    def bytes(self) -> int:
        """Return the peak, in bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
        for line in lines:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.removeprefix("VmHWM:").removesuffix("kB"))
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

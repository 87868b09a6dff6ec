"""Hardware and versions, which are recorded with every measurement."""

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from reference_trainer.logging.records import Environment


def environment(device: torch.device) -> Environment:
    """Return date, hardware and versions."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

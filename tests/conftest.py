"""One seed for every test, and hypothesis profiles."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers that share the cores share the threads: on small tensors they would only wait.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

settings.register_profile(
    "ci",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Let collections of garbage pass over what was imported: a seventh of a tiny run's time."""
    gc.freeze()

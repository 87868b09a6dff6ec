"""Hypothesis strategies for modules, histories, optimizers, schedules, clocks and ratios."""

from relora_core.testing.expressions import Call
from relora_core.testing.strategies.modules import (
    histories,
    layers,
    low_rank_modules,
    with_sites,
    with_split_bases,
)
from relora_core.testing.strategies.training import (
    calls,
    clocks,
    optimizers,
    ratios,
    schedules,
    shapes,
    trained,
)

__all__ = [
    "Call",
    "calls",
    "clocks",
    "histories",
    "layers",
    "low_rank_modules",
    "optimizers",
    "ratios",
    "schedules",
    "shapes",
    "trained",
    "with_sites",
    "with_split_bases",
]

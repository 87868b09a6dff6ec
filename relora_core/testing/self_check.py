"""The checks of this library's layers, optimizer resets, schedules and restarts."""

import math
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from relora_core.optim.optimizer import ResettableOptimizer
from relora_core.schedule import JaggedCosine, JaggedLR, Restarts
from relora_core.testing.checks.modules import check_low_rank
from relora_core.testing.checks.resets import check_resettable
from relora_core.testing.checks.restarts import check_restart
from relora_core.testing.checks.runner import Held
from relora_core.testing.checks.schedules import check_schedule
from relora_core.testing.strategies.modules import low_rank_modules
from relora_core.testing.strategies.training import calls, optimizers

_HORIZON = 61  # steps; the kit checks no schedule beyond them


def wrapped(params: list[nn.Parameter], *, lr: float) -> ResettableOptimizer:
    """Return a `ResettableOptimizer` that wraps AdamW."""
    return ResettableOptimizer(torch.optim.AdamW(params, lr=lr))


def cosine(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Return the cosine schedule that `JaggedCosine` follows outside its ramps."""
    return LambdaLR(optimizer, JaggedCosine(_HORIZON))


def jagged_cosine(inner: LRScheduler, restarts: Restarts) -> LambdaLR:
    """Return `JaggedCosine` in place of the given cosine schedule."""
    for group in inner.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(inner.optimizer, JaggedCosine(_HORIZON, restarts))


#: The checks of `python -m relora_core.testing`, by name: functions of hypothesis settings.
CHECKS: dict[str, Callable[[hypothesis.settings], list[Held]]] = {
    "low-rank modules": lambda profile: check_low_rank(low_rank_modules(), profile=profile),
    "low-rank modules in float16": lambda profile: check_low_rank(
        # A 16-bit W that is not split loses part of small merges, as the docs explain.
        low_rank_modules(dtypes=[torch.float16]),
        may_lose=math.inf,
        profile=profile,
    ),
    "resets of torch's optimizers": lambda profile: check_resettable(optimizers(), profile=profile),
    "resets through ResettableOptimizer": lambda profile: check_resettable(
        calls(wrapped, lr=st.just(0.01)), profile=profile
    ),
    "resets of factored statistics": lambda profile: check_resettable(
        calls(torch.optim.Adafactor, lr=st.just(0.01)),
        prune_ratios=st.just(1.0),
        sizes=st.just(((6, 5), (7, 4))),
        profile=profile,
    ),
    "JaggedLR over torch's schedulers": lambda profile: check_schedule(JaggedLR, profile=profile),
    "JaggedCosine": lambda profile: check_schedule(jagged_cosine, inner=cosine, profile=profile),
    "restarts against Algorithm 1": lambda profile: check_restart(profile=profile),
}

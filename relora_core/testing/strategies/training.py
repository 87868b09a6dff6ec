"""Hypothesis strategies for optimizers, schedules and clocks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch.optim import lr_scheduler

from relora_core.schedule import Restarts
from relora_core.testing.examples import (
    constant_times_exponential,
    inverse_time,
    nineteen_twentieths,
    warmup_then_cosine,
)
from relora_core.testing.expressions import Call
from relora_core.testing.training import Trained


def calls(
    function: Callable[..., Any], /, **arguments: SearchStrategy[Any]
) -> SearchStrategy[Call]:
    """Draw deferred calls of a function or class: factories that print as code.

    Args:
        function: function or class that makes your module or optimizer.
        arguments: strategy for each keyword argument.

    Examples:
        >>> from hypothesis import find
        >>> from torch import nn
        >>> find(calls(nn.Linear, in_features=st.integers(2, 9), out_features=st.just(3)), bool)
        nn.Linear(in_features=2, out_features=3)
    """
    return st.fixed_dictionaries(arguments).map(lambda drawn: Call(function, (), drawn))


def optimizers() -> SearchStrategy[Call]:
    """Draw factories of every torch optimizer whose moments a reset can prune.

    Adafactor is left out because its statistics can only be reset in full; ASGD, Rprop and LBFGS
    are left out because a reset refuses them.

    Examples:
        >>> from hypothesis import find
        >>> find(optimizers(), lambda call: call.function is torch.optim.RMSprop)
        torch.optim.RMSprop(lr=0.01, momentum=0.0, centered=False)
    """
    kinds: list[tuple[type[torch.optim.Optimizer], dict[str, list[Any]]]] = [
        (torch.optim.AdamW, {"amsgrad": [False, True], "foreach": [None, True], "lr": [0.01]}),
        (torch.optim.Adam, {"amsgrad": [False, True], "betas": [(0.9, 0.999), (0.0, 0.9)]}),
        (torch.optim.SGD, {"momentum": [0.0, 0.9], "nesterov": [False]}),
        (torch.optim.SGD, {"momentum": [0.9], "nesterov": [True]}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.RMSprop, {"momentum": [0.0, 0.9], "centered": [False, True]}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {}),
    ]

    def of(kind: type[torch.optim.Optimizer], options: dict[str, list[Any]]) -> Any:
        values = {key: st.sampled_from(choices) for key, choices in options.items()}
        return calls(kind, **{"lr": st.just(0.01), **values})

    return st.one_of([of(kind, options) for kind, options in kinds])


def shapes(most: int = 3) -> SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Draw the shapes of an optimizer's Parameters: at least two, with one to three dimensions.

    Args:
        most: largest number of Parameters.

    Examples:
        >>> from hypothesis import find
        >>> find(shapes(), bool)
        ((1,), (1,))
    """
    one = st.lists(st.sampled_from([1, 2, 3, 7]), min_size=1, max_size=3).map(tuple)
    return st.lists(one, min_size=2, max_size=most).map(tuple)


def ratios() -> SearchStrategy[float]:
    """Draw prune ratios: any from 0 to 1, and often the usual ones.

    Examples:
        >>> from hypothesis import find
        >>> find(ratios(), lambda ratio: ratio > 0.99)
        0.999
    """
    usual = st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.99, 0.999, 1.0])
    return usual | st.floats(0, 1, width=16).filter(math.isfinite)


@st.composite
def clocks(draw: DrawFn, longest: int = 12) -> Restarts:
    """Draw a clock: any period, warm-up, anneal and first restart.

    Args:
        draw: draw function, passed by hypothesis.
        longest: longest period.

    Examples:
        >>> from hypothesis import find
        >>> find(clocks(), lambda clock: clock.warmup > 1)
        Restarts(every=3, warmup=2, first=None, anneal=0)
    """
    every = draw(st.integers(2, longest))
    warmup = draw(st.integers(1, every - 1))
    anneal = draw(st.integers(0, every - 1 - warmup))
    early, late = st.integers(anneal + 1, every), st.integers(every, 2 * longest)
    first = draw(st.none() | early | late)
    return Restarts(every, warmup, first=first, anneal=anneal)


def schedules(longest: int = 60) -> SearchStrategy[Call]:
    """Draw factories of torch's schedulers; each factory is a function of an optimizer.

    Args:
        longest: number of steps that every scheduler must support.

    Examples:
        >>> from hypothesis import find
        >>> find(schedules(), lambda call: call.function is lr_scheduler.StepLR)
        torch.optim.lr_scheduler.StepLR(step_size=1, gamma=0.1)
    """
    whole, enough = st.integers(1, 30), st.integers(longest + 1, longest + 30)
    rate = st.sampled_from([0.1, 0.5, 0.95])
    return st.one_of(
        calls(lr_scheduler.ConstantLR, factor=rate, total_iters=whole),
        calls(lr_scheduler.LinearLR, start_factor=rate, total_iters=whole),
        calls(lr_scheduler.ExponentialLR, gamma=rate),
        calls(lr_scheduler.StepLR, step_size=whole, gamma=rate),
        calls(
            lr_scheduler.MultiStepLR,
            milestones=st.lists(whole, max_size=3).map(sorted),
            gamma=rate,
        ),
        calls(lr_scheduler.PolynomialLR, total_iters=whole, power=st.sampled_from([1.0, 2.0])),
        calls(lr_scheduler.CosineAnnealingLR, T_max=whole),
        calls(lr_scheduler.CosineAnnealingWarmRestarts, T_0=whole),
        calls(lr_scheduler.CyclicLR, base_lr=st.just(0.1), max_lr=rate, step_size_up=whole),
        calls(lr_scheduler.OneCycleLR, max_lr=rate, total_steps=enough),
        calls(lr_scheduler.ReduceLROnPlateau, patience=st.integers(0, 3), factor=rate),
        calls(lr_scheduler.LambdaLR, lr_lambda=st.just(inverse_time)),
        calls(lr_scheduler.MultiplicativeLR, lr_lambda=st.just(nineteen_twentieths)),
        calls(warmup_then_cosine, milestone=whole),
        calls(constant_times_exponential, gamma=rate),
    )


def trained(
    factories: SearchStrategy[Any], sizes: SearchStrategy[tuple[tuple[int, ...], ...]] | None = None
) -> SearchStrategy[Trained]:
    """Draw optimizers that have taken some steps, with any seed and with or without ties.

    Args:
        factories: strategy of optimizer factories, such as `optimizers()`.
        sizes: strategy of the Parameters' shapes; None for `shapes()`.

    Examples:
        >>> from hypothesis import find
        >>> find(trained(st.just(torch.optim.AdamW)), lambda case: case.steps > 1).steps
        2
    """
    return st.builds(
        Trained,
        factories,
        shapes=shapes() if sizes is None else sizes,
        steps=st.integers(1, 4),
        seed=st.integers(0, 9),
        ties=st.booleans(),
    )

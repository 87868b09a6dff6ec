"""What the kit draws: modules, optimizers, schedules, clocks and what happens to them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn
from torch.optim import lr_scheduler

from relora_core.bases import split_bases_
from relora_core.register import register_low_rank
from relora_core.schedule import Restarts
from relora_core.sites import add_low_rank_, low_rank_sites
from relora_core.testing.calls import Call
from relora_core.testing.histories import EVENTS, Event
from relora_core.testing.layers import (
    NormalizedLinear,
    Residual,
    SelfAttention,
    SelfBilinear,
    TiedHead,
    TransposedLinear,
)

# Small, prime, one, and far apart: a matrix of 1 x 31, say.
_SIZES = st.sampled_from([1, 2, 3, 5, 7, 31])
_ALPHAS = st.none() | st.sampled_from([1.0, 2.0, 0.5, 7.0])


def calls(
    function: Callable[..., Any], /, **arguments: SearchStrategy[Any]
) -> SearchStrategy[Call]:
    """Draw calls of a function or class with arguments by keyword: factories that can be printed.

    Args:
        function: what makes your module, or optimizer.
        arguments: a strategy for each argument that is to vary.

    Example:
        >>> from hypothesis import find
        >>> find(calls(nn.Linear, in_features=st.integers(2, 9), out_features=st.just(3)), bool)
        nn.Linear(in_features=2, out_features=3)
    """
    return st.fixed_dictionaries(arguments).map(lambda drawn: Call(function, (), drawn))


@st.composite
def layers(draw: DrawFn, dtype: torch.dtype = torch.float32) -> Call:
    """Draw a layer of any kind that may have a low-rank site, without one.

    Linear, Embedding, Conv1d to 3d and transposed (groups, strides), Bilinear, attention's
    `out_proj`, and layers that use their weight by operators of their own.

    Args:
        draw: hypothesis gives it.
        dtype: of the weights.

    Example:
        >>> from hypothesis import find
        >>> find(layers(), lambda call: call.function is nn.Linear)
        nn.Linear(1, 1)
    """
    typed = {} if dtype == torch.float32 else {"dtype": dtype}
    kind = draw(st.sampled_from(["linear", "embedding", "conv", "bilinear", "attention", "own"]))
    if kind == "linear":
        bias = {"bias": False} if draw(st.booleans()) else {}
        return Call(nn.Linear, (draw(_SIZES), draw(_SIZES)), {**bias, **typed})
    if kind == "embedding":
        vocab, padding = draw(_SIZES), {"padding_idx": 0} if draw(st.booleans()) else {}
        return Call(nn.Embedding, (max(2, vocab), draw(_SIZES)), {**padding, **typed})
    if kind == "conv":
        convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
        conv, groups = draw(st.sampled_from(convs)), draw(st.sampled_from([1, 2]))
        channels = [groups * draw(st.sampled_from([1, 2, 3])) for _ in range(2)]
        options = {"groups": groups} if groups > 1 else {}
        return Call(conv, (*channels, draw(st.integers(1, 3))), {**options, **typed})
    if kind == "bilinear":
        return Call(SelfBilinear, (draw(st.sampled_from([1, 2, 5])), draw(_SIZES)), typed)
    if kind == "attention":
        return Call(SelfAttention, draw(st.sampled_from([(2, 1), (4, 2), (3, 3)])), typed)
    own = draw(st.sampled_from([TransposedLinear, NormalizedLinear]))
    return Call(own, (draw(_SIZES), draw(_SIZES)), typed)


@st.composite
def low_rank_modules(
    draw: DrawFn, dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16)
) -> Call:
    """Draw modules with low-rank sites: single layers, stacks, nested ones, tied ones.

    With any rank that fits, any scale, biases or none, seeds, a trained scale, dropout; a W of
    bfloat16 is split (`split_bases_`), as one that keeps its value must be.

    Args:
        draw: hypothesis gives it.
        dtypes: of the weights.

    Example:
        >>> from hypothesis import find
        >>> find(low_rank_modules(), lambda call: "TiedHead" in repr(call))
        relora.add_low_rank_(testing.TiedHead(2, 1), 'mix', rank=1)
    """
    dtype = draw(st.sampled_from(list(dtypes)))
    targets: Any = "*"
    typed = {} if dtype == torch.float32 else {"dtype": dtype}
    form = draw(st.sampled_from(["single", "stack", "nested", "tied", "projections"]))
    if form == "single":
        model = draw(layers(dtype))
    elif form == "tied":
        model, targets = Call(TiedHead, (draw(st.integers(2, 7)), draw(_SIZES)), typed), "mix"
    elif form == "projections":
        heads = draw(st.integers(1, 2))
        model, targets = Call(nn.MultiheadAttention, (2 * heads, heads), typed), None
    else:
        inner, hidden, out = (draw(_SIZES) for _ in range(3))
        middle = Call(nn.Linear, (hidden, hidden), typed)
        if form == "nested":
            middle = Call(Residual, (Call(Residual, (middle,)), Call(nn.Tanh)))
        first, last = Call(nn.Linear, (inner, hidden), typed), Call(nn.Linear, (hidden, out), typed)
        model = Call(nn.Sequential, (first, Call(nn.Tanh), middle, last))
    made = draw(with_sites(model, targets))
    if form in ("stack", "nested") and draw(st.integers(0, 3)) == 3:
        made.kwargs["dropout"] = 0.5
    return Call(with_split_bases, (made,)) if dtype == torch.bfloat16 else made


@st.composite
def with_sites(draw: DrawFn, make: Call, targets: str | list[str] | None = "*") -> Call:
    """Draw factories of a module with low-rank sites, of any rank that fits, scale and seed.

    Args:
        draw: hypothesis gives it.
        make: of the module, without sites.
        targets: as of `add_low_rank_`; a module that is itself a layer becomes a site for "*".
            None: the projections of an attention.

    Example:
        >>> from hypothesis import find
        >>> find(with_sites(Call(nn.Linear, (5, 5))), lambda call: call.kwargs["rank"] > 2)
        relora.register_low_rank(nn.Linear(5, 5), rank=3)
    """
    whole = make()
    function: Callable[..., Any] = register_low_rank
    arguments: tuple[Any, ...] = (make,)
    if targets is None:
        arguments = (make, "in_proj_weight")
    elif targets != "*" or whole._parameters.get("weight") is None:
        function, arguments = add_low_rank_, (make, targets)
    function(whole, *arguments[1:], rank=1)
    largest = min(
        min(site.lora_B.shape[0], site.lora_A.shape[1]) for _, site in low_rank_sites(whole)
    )
    options: dict[str, Any] = {"rank": draw(st.integers(1, largest))}
    alpha, seed = draw(_ALPHAS), draw(st.sampled_from([0, 1, 2**63 - 1]))
    if alpha is not None:
        options["alpha"] = alpha
    if seed:
        options["seed"] = seed
    if draw(st.integers(0, 3)) == 3:
        options["trainable_scale"] = True
    return Call(function, arguments, options)


def with_split_bases(model: nn.Module) -> nn.Module:
    """Return the model, after `split_bases_`.

    Example:
        >>> from relora_core import register_low_rank
        >>> layer = with_split_bases(register_low_rank(nn.Linear(2, 2), rank=1))
        >>> layer.parametrizations.weight.original.dtype
        torch.bfloat16
    """
    split_bases_(model)
    return model


def histories(longest: int = 6) -> SearchStrategy[list[Event]]:
    """Draw what a model has been through: events for `lived`, in any order.

    Args:
        longest: how many at most.

    Example:
        >>> from hypothesis import find
        >>> find(histories(), lambda events: len(events) > 1)
        ['fill', 'fill']
    """
    return st.lists(st.sampled_from(EVENTS), max_size=longest)


@st.composite
def clocks(draw: DrawFn, longest: int = 12) -> Restarts:
    """Draw a clock: any period, warm-up, anneal and first restart.

    Args:
        draw: hypothesis gives it.
        longest: the period at most.

    Example:
        >>> from hypothesis import find
        >>> find(clocks(), lambda clock: clock.warmup > 1)
        Restarts(every=3, warmup=2, first=None, anneal=0)
    """
    every = draw(st.integers(2, longest))
    warmup = draw(st.integers(1, every - 1))
    anneal = draw(st.integers(0, every - 1 - warmup))
    first = draw(st.none() | st.integers(anneal + 1, 3 * longest))
    if first is None and every <= anneal:
        first = every + 1
    return Restarts(every, warmup, first=first, anneal=anneal)


def optimizers() -> SearchStrategy[Call]:
    """Draw factories of every torch optimizer whose moments a reset can prune.

    Adafactor, whose statistics can only be reset whole, is none of them; nor are ASGD, Rprop and
    LBFGS, which are refused.

    Example:
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


def schedules() -> SearchStrategy[Call]:
    """Draw factories of every scheduler that torch ships, from an optimizer.

    Example:
        >>> from hypothesis import find
        >>> find(schedules(), lambda call: call.function is lr_scheduler.StepLR)
        torch.optim.lr_scheduler.StepLR(step_size=1, gamma=0.1)
    """
    whole = st.integers(1, 30)
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
        calls(lr_scheduler.OneCycleLR, max_lr=rate, total_steps=st.integers(61, 90)),
        calls(lr_scheduler.ReduceLROnPlateau, patience=st.integers(0, 3), factor=rate),
        calls(lr_scheduler.LambdaLR, lr_lambda=st.just(inverse_time)),
        calls(lr_scheduler.MultiplicativeLR, lr_lambda=st.just(nineteen_twentieths)),
        calls(warmup_then_cosine, milestone=whole),
        calls(constant_times_exponential, gamma=rate),
    )


def inverse_time(step: int) -> float:
    """Return 1 / (1 + step), for `LambdaLR`.

    Example:
        >>> inverse_time(1)
        0.5
    """
    return 1 / (1 + step)


def nineteen_twentieths(step: int) -> float:
    """Return 0.95 at any step, for `MultiplicativeLR`.

    Example:
        >>> nineteen_twentieths(1)
        0.95
    """
    return 0.95


def warmup_then_cosine(
    optimizer: torch.optim.Optimizer, *, milestone: int
) -> lr_scheduler.SequentialLR:
    """Return a warm-up followed by a cosine, by torch's `SequentialLR`.

    Args:
        optimizer: whose rate it drives.
        milestone: the cosine's first step.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> warmup_then_cosine(optimizer, milestone=5).get_last_lr()
        [0.1]
    """
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.1),
        lr_scheduler.CosineAnnealingLR(optimizer, 30),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[milestone])


def constant_times_exponential(
    optimizer: torch.optim.Optimizer, *, gamma: float
) -> lr_scheduler.ChainedScheduler:
    """Return two schedulers that act together, by torch's `ChainedScheduler`.

    Args:
        optimizer: whose rate they drive.
        gamma: of the exponential one.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> constant_times_exponential(optimizer, gamma=0.5).get_last_lr()
        [0.5]
    """
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.ConstantLR(optimizer, 0.5, 4),
        lr_scheduler.ExponentialLR(optimizer, gamma),
    ]
    return lr_scheduler.ChainedScheduler(parts)


def shapes(most: int = 3) -> SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Draw the shapes of an optimizer's Parameters: two at least, of one to three dimensions.

    Args:
        most: how many.

    Example:
        >>> from hypothesis import find
        >>> find(shapes(), bool)
        ((1,), (1,))
    """
    one = st.lists(st.sampled_from([1, 2, 3, 7]), min_size=1, max_size=3).map(tuple)
    return st.lists(one, min_size=2, max_size=most).map(tuple)


def ratios() -> SearchStrategy[float]:
    """Draw prune ratios: any, and those that trainers use.

    Example:
        >>> from hypothesis import find
        >>> find(ratios(), lambda ratio: ratio > 0.99)
        0.999
    """
    usual = st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.99, 0.999, 1.0])
    return usual | st.floats(0, 1, width=16).filter(math.isfinite)

"""Which tensors of an optimizer's state are moments: a fact about each optimizer class."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_STEP = {"step": 0.0}


@dataclass(frozen=True)
class StateLayout:
    """What the state of one parameter consists of.

    Args:
        moments: keys of the running averages, each of the parameter's shape. The first leads: a
            joint mask is chosen by its magnitudes.
        others: keys that a reset must leave alone.
        clock: keys that count steps, each with the value it begins at.
        factors: keys of statistics that many entries share, of another shape than the parameter's.
            Only a full reset zeroes them.
    """

    moments: tuple[str, ...]
    others: tuple[str, ...] = ()
    clock: Mapping[str, float] = field(default_factory=lambda: _STEP)
    factors: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParameterState:
    """What a reset works on of one parameter.

    Args:
        index: of the parameter among those asked for.
        moments: of its shape, the leading one first.
        factors: of other shapes.
        state: the optimizer's own dict of it.
        clock: keys of `state` that count steps, and where they begin.
    """

    index: int
    moments: list[Tensor]
    factors: list[Tensor]
    state: dict[str, Any]
    clock: Mapping[str, float]


_ADAM = StateLayout(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
_MOMENTUM = StateLayout(("momentum_buffer",), clock={})
_LAYOUTS: dict[type[Optimizer], StateLayout] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.NAdam: StateLayout(("exp_avg", "exp_avg_sq"), clock={**_STEP, "mu_product": 1.0}),
    torch.optim.Adamax: StateLayout(("exp_avg", "exp_inf")),
    torch.optim.SGD: _MOMENTUM,
    torch.optim.RMSprop: StateLayout(("momentum_buffer", "grad_avg", "square_avg")),
    torch.optim.Adagrad: StateLayout(("sum",)),
    torch.optim.Adadelta: StateLayout(("acc_delta", "square_avg")),
    torch.optim.Adafactor: StateLayout(("variance",), factors=("row_var", "col_var")),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
    _LAYOUTS[torch.optim.Muon] = _MOMENTUM
_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.ASGD: "its `ax` is an average of the parameter, which a redraw makes meaningless",
    torch.optim.Rprop: "its `step_size` is a step length for each entry, not an average",
    torch.optim.LBFGS: "its history belongs to all parameters together",
}


def declare_moments(
    optimizer_class: type[Optimizer],
    moments: Iterable[str],
    *,
    others: Iterable[str] = (),
    clock: Mapping[str, float] | None = None,
) -> None:
    """Tell resets what the state of an optimizer class consists of.

    "Same shape as the parameter" is no rule: it would wipe ASGD's averaged weights, Rprop's step
    sizes and the uint8 codes of 8-bit optimizers, whose code 0 is not zero.

    Args:
        optimizer_class: the class; subclasses with the same state follow it.
        moments: keys of `optimizer.state[p]` that are running averages of the gradient or of its
            powers, of the parameter's shape. The first one's magnitudes choose a joint mask.
        others: keys that a reset leaves alone.
        clock: keys that count the parameter's steps, each with the value it begins at;
            `{"step": 0}` if None. `reset_step` writes them.

    Raises:
        TypeError: if `optimizer_class` is not a subclass of `torch.optim.Optimizer`.
        ValueError: if `moments` is empty.

    Example:
        >>> class Signum(torch.optim.SGD):
        ...     pass
        >>> declare_moments(Signum, ["momentum_buffer"], clock={})
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class must be an Optimizer subclass; got {optimizer_class!r}")
    begins = _STEP if clock is None else dict(clock)
    layout = StateLayout(tuple(moments), tuple(others), begins)
    if not layout.moments:
        raise ValueError("moments is empty: name at least one key of the optimizer's state")
    _LAYOUTS[optimizer_class] = layout


def find_states(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[ParameterState]:
    """Return what there is to reset of each parameter.

    Args:
        optimizer: a torch optimizer, or a wrapper that keeps it as `optim`
            (ZeroRedundancyOptimizer), `optimizer` (accelerate, Lightning) or in `optimizers`.
        params: some of its parameters. One that has no state yet, or whose state lies on another
            rank, is passed over.

    Raises:
        ValueError: if a parameter is not the optimizer's, or the state has undeclared keys.
    """
    params = list(params)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    inner = list(inner_optimizers(optimizer))
    held |= {id(p) for one in inner for group in one.param_groups for p in group["params"]}
    missing = sum(id(p) not in held for p in params)
    if missing:
        raise ValueError(
            f"{missing} of {len(params)} parameters are not in the optimizer: build it after "
            "add_low_rank_ and fully_shard, from the parameters that require gradients"
        )
    found = []
    for one in inner:
        layout = None
        for index, p in enumerate(params):
            # Never state[p]: it is a defaultdict, and an entry made by looking breaks others.
            state = one.state.get(p)
            if state:
                layout = layout or _layout_of(one, state)
                _check_keys(one, layout, state)
                moments = _moments_of(one, layout, state, p)
                factors = [state[key] for key in layout.factors if state.get(key) is not None]
                found.append(ParameterState(index, moments, factors, state, layout.clock))
    return found


def inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the torch optimizers that hold the state behind `optimizer`."""
    several = getattr(optimizer, "optimizers", None)
    for one in several if several is not None else [_inside(optimizer)]:
        if one is None:
            yield optimizer
        else:
            yield from inner_optimizers(one)


def _inside(optimizer: Optimizer) -> Optimizer | None:
    for attribute in ("inner", "optim", "optimizer"):
        one = getattr(optimizer, attribute, None)
        if isinstance(one, Optimizer) and one is not optimizer:
            return one
    return None


def _layout_of(optimizer: Optimizer, state: dict[str, object]) -> StateLayout:
    name = type(optimizer).__name__
    for cls in type(optimizer).__mro__:
        if cls in _LAYOUTS:
            return _LAYOUTS[cls]
        if cls in _REFUSED:
            raise ValueError(f"{name} cannot be reset: {_REFUSED[cls]}")
    raise ValueError(
        f"which of {name}'s states {sorted(state)} are moments is not known: declare them with "
        f"relora_core.declare_moments({name}, [<moments>], others=[<the rest>])"
    )


def _check_keys(optimizer: Optimizer, layout: StateLayout, state: dict[str, object]) -> None:
    known = {*layout.moments, *layout.others, *layout.clock, *layout.factors}
    unknown = set(state) - known
    if unknown:
        name = type(optimizer).__name__
        raise ValueError(
            f"{name} keeps states {sorted(unknown)} that its declaration lacks: declare them with "
            f"relora_core.declare_moments({name}, [<moments>], others=[<the rest>])"
        )


def _moments_of(
    optimizer: Optimizer, layout: StateLayout, state: dict[str, Any], p: nn.Parameter
) -> list[Tensor]:
    moments = [state[key] for key in layout.moments if state.get(key) is not None]
    for moment in moments:
        if not isinstance(moment, Tensor) or moment.shape != p.shape:
            raise ValueError(
                f"{type(optimizer).__name__}: a moment must be a tensor of its parameter's shape "
                f"{tuple(p.shape)}; got {getattr(moment, 'shape', type(moment))}"
            )
    return moments

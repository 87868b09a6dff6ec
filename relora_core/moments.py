"""Which tensors of an optimizer's state are moments: a fact about each optimizer class."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class StateLayout:
    """What the state of one parameter consists of.

    Args:
        moments: keys of the running averages, each of the parameter's shape. The first leads: a
            joint mask is chosen by its magnitudes.
        others: keys that a reset must leave alone.
    """

    moments: tuple[str, ...]
    others: tuple[str, ...] = ("step",)


_ADAM = StateLayout(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
_LAYOUTS: dict[type[Optimizer], StateLayout] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.NAdam: StateLayout(("exp_avg", "exp_avg_sq"), ("step", "mu_product")),
    torch.optim.Adamax: StateLayout(("exp_avg", "exp_inf")),
    torch.optim.SGD: StateLayout(("momentum_buffer",), ()),
    torch.optim.RMSprop: StateLayout(("momentum_buffer", "grad_avg", "square_avg")),
    torch.optim.Adagrad: StateLayout(("sum",)),
    torch.optim.Adadelta: StateLayout(("acc_delta", "square_avg")),
}


def declare_moments(
    optimizer_class: type[Optimizer], moments: Iterable[str], *, others: Iterable[str] = ("step",)
) -> None:
    """Tell resets what the state of an optimizer class consists of.

    "Same shape as the parameter" is no rule: it would wipe ASGD's averaged weights, Rprop's step
    sizes and the uint8 codes of 8-bit optimizers, whose code 0 is not zero.

    Args:
        optimizer_class: the class; subclasses with the same state follow it.
        moments: keys of `optimizer.state[p]` that are running averages of the gradient or of its
            powers, of the parameter's shape. The first one's magnitudes choose a joint mask.
        others: keys that a reset leaves alone.

    Raises:
        TypeError: if `optimizer_class` is not a subclass of `torch.optim.Optimizer`.
        ValueError: if `moments` is empty.

    Example:
        >>> class Signum(torch.optim.SGD):
        ...     pass
        >>> declare_moments(Signum, ["momentum_buffer"], others=[])
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class must be an Optimizer subclass; got {optimizer_class!r}")
    layout = StateLayout(tuple(moments), tuple(others))
    if not layout.moments:
        raise ValueError("moments is empty: name at least one key of the optimizer's state")
    _LAYOUTS[optimizer_class] = layout


def find_moments(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[list[Tensor]]:
    """Return the moments of each parameter, the leading one first.

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
        for p in params:
            # Never state[p]: it is a defaultdict, and an entry made by looking breaks others.
            state = one.state.get(p)
            if state:
                layout = layout or _layout_of(one, state)
                found.append(_moments_of(one, layout, state, p))
    return [moments for moments in found if moments]


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
    for cls in type(optimizer).__mro__:
        if cls in _LAYOUTS:
            return _LAYOUTS[cls]
    name = type(optimizer).__name__
    raise ValueError(
        f"which of {name}'s states {sorted(state)} are moments is not known: declare them with "
        f"relora_core.declare_moments({name}, [<moments>], others=[<the rest>])"
    )


def _moments_of(
    optimizer: Optimizer, layout: StateLayout, state: dict[str, object], p: nn.Parameter
) -> list[Tensor]:
    unknown = set(state) - set(layout.moments) - set(layout.others)
    if unknown:
        name = type(optimizer).__name__
        raise ValueError(
            f"{name} keeps states {sorted(unknown)} that its declaration lacks: declare them with "
            f"relora_core.declare_moments({name}, [<moments>], others=[<the rest>])"
        )
    moments = [state[key] for key in layout.moments if state.get(key) is not None]
    for moment in moments:
        if not isinstance(moment, Tensor) or moment.shape != p.shape:
            raise ValueError(
                f"{type(optimizer).__name__}: a moment must be a tensor of its parameter's shape "
                f"{tuple(p.shape)}; got {getattr(moment, 'shape', type(moment))}"
            )
    return moments  # type: ignore[return-value]

"""The moments of an optimizer's state, as magnitudes to compare and entries to zero."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.distributed.local import local
from relora_core.optim.copies import refuse_copies
from relora_core.optim.pruning import check_prunable, zero_where_
from relora_core.optim.quantized import QuantizedMoment, TableMoment, is_quantized
from relora_core.optim.state_layouts import (
    StateLayout,
    copies_beside,
    copies_of_wrappers,
    known_layout,
    layout_of,
    refuse_unfit,
)


class Moment(Protocol):
    """A running average, in whatever format it is stored."""

    @property
    def tensor(self) -> Tensor:
        """The stored tensor, with the parameter's shape and sharding."""

    @property
    def has_zero(self) -> bool:
        """Whether every single entry can be set to zero."""

    def values(self) -> Tensor:
        """Return the values that are stored, as floating point, sharded as `tensor`."""

    def zero_where_(self, mask: Tensor) -> None:
        """Zero the entries of this process's part that `mask` marks; others keep their bits."""


@dataclass(frozen=True)
class PlainMoment:
    """A moment that is stored as its values."""

    tensor: Tensor
    has_zero: bool = True

    def values(self) -> Tensor:
        """Return the tensor."""
        return self.tensor

    def zero_where_(self, mask: Tensor) -> None:
        """Zero the entries that `mask` marks."""
        zero_where_(self.tensor, mask)


@dataclass(frozen=True)
class ParameterState:
    """The state of one parameter that a reset works on.

    Args:
        index: the parameter's index among those asked for.
        parameter: the parameter.
        moments: its moments, of its shape, the leading one first.
        shared: its statistics of other shapes.
        copies: the optimizer's copies of it.
        state: the optimizer's own state dict of it.
        clock: the keys of `state` that count steps, with their initial values.
    """

    index: int
    parameter: nn.Parameter
    moments: list[Moment]
    shared: list[Tensor]
    copies: list[Tensor]
    state: dict[str, Any]
    clock: Mapping[str, float]


# One optimizer, or all that step a model.
Optimizers = Optimizer | Iterable[Optimizer] | Mapping[Any, Optimizer]


def find_states(optimizer: Optimizers, params: Iterable[nn.Parameter]) -> list[ParameterState]:
    """Return the state to reset of each parameter.

    Args:
        optimizer: a torch optimizer, or a wrapper that keeps it as `optim`
            (ZeroRedundancyOptimizer), `optimizer` (accelerate, Lightning) or in `optimizers`
            (torchtitan); or several, in a list, tuple or dict.
        params: some of their parameters. A parameter that has no state yet, or whose state is on
            another process, is skipped.

    Raises:
        ValueError: if a parameter is not the optimizer's, the optimizer cannot be reset, or its
            state has undeclared keys.
        TypeError: if `optimizer` is not an optimizer, or a moment is neither floating point nor in
            a known code.
    """
    params, several = list(params), optimizers_of(optimizer)
    inner = [one for outer in several for one in inner_optimizers(outer)]
    for one in inner:
        refuse_unfit(one)
    for outer in several:
        refuse_copies(layers_of(outer), params)
    missing = len(params) - len(held_by(several, params))
    if missing:
        raise ValueError(
            f"{missing} of {len(params)} parameters are not in the optimizer: build it after "
            "add_low_rank_ and fully_shard, from the parameters that require gradients; if there "
            "are several optimizers, give all of them as a list. An engine that steps its own "
            "copies (DeepSpeed's fp32 masters) cannot restart: a redraw would not reach them"
        )
    found = []
    for outer in several:
        beside = {key for one in layers_of(outer) for key in copies_beside(type(one))}
        for one in inner_optimizers(outer):
            for index, p in enumerate(params):
                # Never state[p]: it is a defaultdict, and an empty entry would break other code.
                state = one.state.get(p)
                if state:
                    found.append(_state_of(one, index, p, state, beside))
    return found


def held_by(optimizer: Optimizers, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those of `params` that one of the optimizers steps."""
    every = [one for outer in optimizers_of(optimizer) for one in layers_of(outer)]
    held = {id(p) for one in every for group in one.param_groups for p in group["params"]}
    return [p for p in params if id(p) in held]


def optimizers_of(optimizer: Optimizers) -> list[Optimizer]:
    """Return the optimizers in `optimizer`: one, or a list, tuple or dict of several.

    Raises:
        TypeError: if one of them is not an optimizer.
        ValueError: if there is none.
    """
    if isinstance(optimizer, Mapping):
        several = list(optimizer.values())
    elif hasattr(optimizer, "param_groups") or not isinstance(optimizer, Iterable):
        several = [optimizer]
    else:
        several = list(optimizer)
    for one in several:
        if not hasattr(one, "param_groups"):
            raise TypeError(
                "optimizer must be a torch optimizer, a wrapper around one, or a list, tuple or "
                f"dict of them; got {type(one).__name__}"
            )
    if not several:
        raise ValueError("there is no optimizer: give those that step the factors")
    return list({id(one): one for one in several}.values())


def inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the torch optimizers that hold the state behind `optimizer`.

    A wrapper counts as one of them if it keeps state of its own.
    """
    inside = _all_inside(optimizer)
    states = [id(one.state) for one in inside if one is not None]
    own = getattr(optimizer, "state", None)
    if None in inside or (own and id(own) not in states):
        yield optimizer
    for one in inside:
        if one is not None:
            yield from inner_optimizers(one)


def layers_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those inside it, from the outermost to the innermost."""
    inside = (one for one in _all_inside(optimizer) if one is not None)
    return [optimizer, *(layer for one in inside for layer in layers_of(one))]


def _all_inside(optimizer: Optimizer) -> list[Optimizer | None]:
    several = getattr(optimizer, "optimizers", None)
    return [_inside(optimizer)] if several is None else list(several)


def _inside(optimizer: Optimizer) -> Optimizer | None:
    for attribute in ("inner", "optim", "optimizer", "base", "base_optimizer", "_base_optimizer"):
        one = getattr(optimizer, attribute, None)
        if isinstance(one, Optimizer) and one is not optimizer:
            return one
    return None


@torch.no_grad()
def renew_copies_(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> None:
    """Set an optimizer's copies of `params`, which later steps start from, to their values now."""
    layout = known_layout(type(optimizer))
    if layout is None:
        return
    for p in params:
        for key in (*layout.copies, *(copies_of_wrappers() - layout.keys)):
            copy = optimizer.state.get(p, {}).get(key)
            if copy is not None:
                local(copy).copy_(local(p))


def _state_of(
    optimizer: Optimizer, index: int, p: nn.Parameter, state: dict[str, Any], beside: set[str]
) -> ParameterState:
    layout = layout_of(optimizer, state, beside)

    def present(keys: tuple[str, ...]) -> dict[str, Any]:
        return {key: state[key] for key in keys if state.get(key) is not None}

    leading, shared, copies = map(present, (layout.moments, layout.shared, layout.copies))
    for what, found in (("moment", leading), ("copy", copies)):
        for one in found.values():
            if not isinstance(one, Tensor) or one.shape != p.shape:
                raise ValueError(
                    f"{type(optimizer).__name__}: a {what} must be a tensor of its parameter's "
                    f"shape {tuple(p.shape)}; got {getattr(one, 'shape', type(one))}"
                )
    moments = [_moment(layout, key, state) for key in leading]
    others = list(shared.values()), list(copies.values())
    return ParameterState(index, p, moments, *others, state, layout.clock)


def _moment(layout: StateLayout, key: str, state: dict[str, Any]) -> Moment:
    tensor: Tensor = state[key]
    table, scales = (state.get(k) for k in layout.codes.get(key, ("", "")))
    if table is not None and scales is not None:
        return TableMoment(tensor, table, scales)
    if is_quantized(tensor):
        return QuantizedMoment(tensor)
    check_prunable(tensor)
    return PlainMoment(tensor)

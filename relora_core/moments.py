"""The moments of an optimizer's state, as values to rank and entries to zero."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.pruning import check_prunable, zero_where_
from relora_core.quantized import QuantizedMoment, TableMoment, is_quantized
from relora_core.state_layouts import StateLayout, layout_of, refuse_unfit


class Moment(Protocol):
    """A running average, whatever it is kept as."""

    @property
    def tensor(self) -> Tensor:
        """What it is kept as, of the parameter's shape and sharded as it is."""

    @property
    def has_zero(self) -> bool:
        """Whether every entry can be made zero by itself."""

    def values(self) -> Tensor:
        """Return what it stands for, floating point and sharded as `tensor`."""

    def zero_where_(self, mask: Tensor) -> None:
        """Zero the entries of this rank's part that `mask` marks; the others keep their bits."""


@dataclass(frozen=True)
class PlainMoment:
    """A moment that is what it stands for."""

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
    """What a reset works on of one parameter.

    Args:
        index: of the parameter among those asked for.
        parameter: itself.
        moments: of its shape, the leading one first.
        shared: statistics of other shapes.
        copies: of its values.
        state: the optimizer's own dict of it.
        clock: keys of `state` that count steps, and where they begin.
    """

    index: int
    parameter: nn.Parameter
    moments: list[Moment]
    shared: list[Tensor]
    copies: list[Tensor]
    state: dict[str, Any]
    clock: Mapping[str, float]


def find_states(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[ParameterState]:
    """Return what there is to reset of each parameter.

    Args:
        optimizer: a torch optimizer, or a wrapper that keeps it as `optim`
            (ZeroRedundancyOptimizer), `optimizer` (accelerate, Lightning) or in `optimizers`
            (torchtitan).
        params: some of its parameters. One that has no state yet, or whose state lies on another
            rank, is passed over.

    Raises:
        ValueError: if a parameter is not the optimizer's, the optimizer cannot be reset, or its
            state has undeclared keys.
        TypeError: if a moment is neither floating point nor in codes that are known.
    """
    params = list(params)
    inner = list(inner_optimizers(optimizer))
    for one in inner:
        refuse_unfit(one)
    held = {
        id(p) for one in (optimizer, *inner) for group in one.param_groups for p in group["params"]
    }
    missing = sum(id(p) not in held for p in params)
    if missing:
        raise ValueError(
            f"{missing} of {len(params)} parameters are not in the optimizer: build it after "
            "add_low_rank_ and fully_shard, from the parameters that require gradients. An engine "
            "that steps copies of its own (DeepSpeed's fp32 masters) cannot restart: a redraw "
            "would not reach them"
        )
    found = []
    for one in inner:
        for index, p in enumerate(params):
            # Never state[p]: it is a defaultdict, and an entry made by looking breaks others.
            state = one.state.get(p)
            if state:
                found.append(_state_of(one, index, p, state))
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


def _state_of(
    optimizer: Optimizer, index: int, p: nn.Parameter, state: dict[str, Any]
) -> ParameterState:
    layout = layout_of(optimizer, state)

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

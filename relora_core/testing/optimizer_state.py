"""Snapshots of an optimizer's state, to be compared."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.optim.moments import find_states, inner_optimizers


def is_known(optimizer: Optimizer, params: list[nn.Parameter]) -> bool:
    """Whether this library knows what the optimizer keeps of `params`."""
    try:
        find_states(optimizer, params)
    except (ValueError, TypeError):
        return False
    return True


def moments_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of the values of all moments of `params`."""
    states = find_states(optimizer, params)
    return [moment.values().clone() for state in states for moment in state.moments]


def first_moments_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of the values of each Parameter's first moment."""
    states = find_states(optimizer, params)
    return [state.moments[0].values().clone() for state in states if state.moments]


def shared_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of the statistics that entries share."""
    states = find_states(optimizer, params)
    return [statistic.clone() for state in states for statistic in state.shared]


def scalars_of(optimizer: Optimizer, p: nn.Parameter) -> list[dict[str, Any]]:
    """Return copies of what each optimizer inside counts of a Parameter: all but larger tensors."""
    return [
        {k: copied(v) for k, v in state.items() if not isinstance(v, Tensor) or v.numel() == 1}
        for state in states_of(optimizer, p)
        if p.numel() > 1
    ]


def states_of(optimizer: Optimizer, p: nn.Parameter) -> list[Mapping[str, Any]]:
    """Return what each optimizer inside keeps of a Parameter; nothing is made by looking."""
    return [one.state.get(p, {}) for one in inner_optimizers(optimizer)]


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyperparameters of each group."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def is_plain(value: Any) -> bool:
    """Whether a value is an ordinary floating-point tensor with entries."""
    return type(value) is Tensor and value.is_floating_point() and value.numel() > 0


def copied(value: Any) -> Any:
    """Return a state with copies of its ordinary tensors."""
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    return value.clone() if type(value) is Tensor else value  # codes of other libraries stay


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same, NaN being itself."""
    if one is other:
        return True
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.detach() == other.detach()
        if one.is_floating_point():
            same = same | (one.isnan() & other.isnan())
        return one.shape == other.shape and bool(same.all())
    return bool(one == other)

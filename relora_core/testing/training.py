"""Optimizers that have taken some steps, and helpers that read their state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.optim.moments import find_states, inner_optimizers
from relora_core.testing.expressions import as_factory


def is_known(optimizer: Optimizer, params: list[nn.Parameter]) -> bool:
    """Whether this library knows the optimizer's state for `params`."""
    try:
        find_states(optimizer, params)
    except (ValueError, TypeError):
        return False
    return True


def moments_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of all moments of `params`."""
    states = find_states(optimizer, params)
    return [moment.values().clone() for state in states for moment in state.moments]


def first_moments_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of each Parameter's first moment."""
    states = find_states(optimizer, params)
    return [state.moments[0].values().clone() for state in states if state.moments]


def shared_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of the statistics that several entries share."""
    states = find_states(optimizer, params)
    return [statistic.clone() for state in states for statistic in state.shared]


def scalars_of(optimizer: Optimizer, p: nn.Parameter) -> list[dict[str, Any]]:
    """Return copies of a Parameter's scalar state, such as step counts, in each inner optimizer."""
    return [
        {k: copied(v) for k, v in state.items() if not isinstance(v, Tensor) or v.numel() == 1}
        for state in states_of(optimizer, p)
        if p.numel() > 1
    ]


def states_of(optimizer: Optimizer, p: nn.Parameter) -> list[Mapping[str, Any]]:
    """Return a Parameter's state in each inner optimizer, without creating empty entries."""
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
    """Return a copy of a state in which ordinary tensors are cloned."""
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    return value.clone() if type(value) is Tensor else value  # quantized tensors are not cloned


def equal(one: Any, other: Any) -> bool:
    """Whether two states are equal; NaN equals NaN."""
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


OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Trained:
    """A factory of an optimizer that has taken some steps; each call makes an identical one.

    Args:
        factory: function that makes the optimizer from a list of Parameters.
        shapes: shapes of the Parameters.
        steps: number of steps to take.
        seed: seed of the values and gradients.
        ties: whether all entries of a gradient have the same magnitude, as pruning or clipping may
            cause.
        dtype: dtype of the Parameters.

    Examples:
        >>> optimizer, params = Trained(torch.optim.AdamW, shapes=((2, 3),), steps=4)()
        >>> optimizer.state[params[0]]["step"]
        tensor(4.)
    """

    factory: OptimizerFactory
    shapes: tuple[tuple[int, ...], ...] = ((4, 3), (5,))
    steps: int = 3
    seed: int = 0
    ties: bool = False
    dtype: torch.dtype = torch.float32

    def __call__(self) -> tuple[Optimizer, list[nn.Parameter]]:
        """Make the Parameters and the optimizer, and take the steps."""
        values = torch.Generator().manual_seed(self.seed)
        params = [
            nn.Parameter(torch.randn(shape, generator=values).to(self.dtype))
            for shape in self.shapes
        ]
        optimizer = self.factory(params)
        for one in (optimizer, *inner_optimizers(optimizer)):
            if hasattr(one, "train"):  # schedule-free
                one.train()
            for group in one.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0  # it would move entries without a gradient
        for step in range(self.steps):
            self.step_(optimizer, params, step)
        return optimizer, params

    def step_(self, optimizer: Optimizer, params: Sequence[nn.Parameter], number: int) -> None:
        """Take step `number` of the training."""
        for index, p in enumerate(params):
            key = 1_000_003 * self.seed + 1009 * number + index + 1
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(key))
            if self.ties:
                gradient = gradient.sign() + (gradient == 0)
            p.grad = gradient.to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()

    def __repr__(self) -> str:
        factory = as_factory(self.factory, "params")
        return (
            f"testing.Trained({factory}, shapes={self.shapes!r}, steps={self.steps}, "
            f"seed={self.seed}, ties={self.ties}, dtype={self.dtype})"
        )


def moved_without_gradient(optimizer: Optimizer, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """Take a step with zero gradients; return for each Parameter a mask of the moved entries."""
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return [p.detach() != old for p, old in zip(params, before, strict=True)]

"""Comparisons of two models: states, outputs, gradients."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relora_core.testing.inputs import loss_of, outputs
from relora_core.testing.subjects import BrokenPromiseError, LowRankSite

_CLOSE = 1e-5  # of the largest value: float64 in all but what a module computes in float32 itself


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of a model's state dict, in which a module's extra state may be anything."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def same_state(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise unless two states are the same, bit for bit; `what` precedes the name that differs."""
    for name in sorted(expected.keys() | actual.keys()):
        one, other = actual.get(name), expected.get(name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same = torch.equal(one, other)
        else:
            same = name in actual and name in expected and bool(one == other)
        if not same:
            raise BrokenPromiseError(f"{what} {name!r}")


@contextmanager
def only_sites_change(
    model: nn.Module, found: Mapping[str, LowRankSite], what: str, *, buffers: bool
) -> Iterator[None]:
    """Raise if a Parameter that is no W, A or B of a site is another at the end of the block.

    Or a buffer, if `buffers`: a redraw may count in one.
    """
    own = {id(t) for site in found.values() for t in (site.weight, site.lora_A, site.lora_B)}
    rest: dict[str, Tensor] = dict(model.named_parameters())
    rest |= dict(model.named_buffers()) if buffers else {}
    rest = {name: p for name, p in rest.items() if id(p) not in own}
    before = {name: p.detach().clone() for name, p in rest.items()}
    yield
    for name, p in rest.items():
        if not torch.equal(p.detach(), before[name]):
            raise BrokenPromiseError(f"{what} changed {name!r}, which is no W and no factor")


def same_outputs(
    one: Callable[..., object], other: Callable[..., object], inputs: Sequence[Tensor], what: str
) -> None:
    """Raise unless two modules return the same, to a fraction of the largest value."""
    with torch.no_grad():
        pairs = list(zip(outputs(one(*inputs)), outputs(other(*inputs)), strict=True))
    for actual, expected in pairs:
        close(actual, expected, what)


def close(actual: Tensor, expected: Tensor, what: str, *, beside: float = 0.0) -> None:
    """Raise unless two tensors are the same, to a fraction of the largest value.

    Args:
        actual: one.
        expected: the other. What is infinite or NaN must be so in both.
        what: begins the message.
        beside: how large values are that these were computed with, which leave their rounding.
    """
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        raise BrokenPromiseError(f"{what}: one is finite where the other is not")
    if not finite.any():
        return
    one, other = actual[finite], expected[finite]
    largest = float(torch.maximum(one.abs().max(), other.abs().max()))
    error = float((one - other).abs().max())
    if not error <= _CLOSE * largest + 1e-9 * beside:
        raise BrokenPromiseError(f"{what}: by {error:.3g}, of {largest:.3g} at most")


def gradients_of(result: object, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a random linear function of outputs, zero where there is none."""
    loss = loss_of(result, seed=0)
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in of.items()}
    found = torch.autograd.grad(loss, list(of.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if g is None else g
        for (name, tensor), g in zip(of.items(), found, strict=True)
    }


@contextmanager
def disturbed(process: int) -> Iterator[None]:
    """Let torch's global generator be that of a process that has used it in its own way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + process)
        torch.rand(process + 1)
        yield

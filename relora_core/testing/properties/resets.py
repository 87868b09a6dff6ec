"""Assertions of what a reset of an optimizer leaves unchanged, and of what it refuses."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.optim.moments import inner_optimizers
from relora_core.optim.reset import ResetReport, reset_optimizer_
from relora_core.testing.subjects import PropertyError
from relora_core.testing.training import (
    Trained,
    copied,
    equal,
    groups_of,
    is_known,
    is_plain,
    moments_of,
    moved_without_gradient,
    scalars_of,
    states_of,
)

ResetFunction = Callable[[Optimizer, list[nn.Parameter], float], object]


def reset_by_relora(optimizer: Optimizer, params: list[nn.Parameter], ratio: float) -> ResetReport:
    """Reset with this library: call `reset_optimizer_` with `prune_ratio=ratio`."""
    return reset_optimizer_(optimizer, params, prune_ratio=ratio)


def assert_reset_leaves_the_rest(
    case: Trained,
    *,
    ratio: float = 0.5,
    reset: ResetFunction = reset_by_relora,
    keeps_counts: bool = True,
) -> None:
    """Assert that a reset of one Parameter's moments changes nothing else, now or later.

    The Parameters, the groups' hyperparameters, the states of other Parameters and the step counts
    must stay the same, and the next step must move the other Parameters as it would without the
    reset.

    Args:
        case: factory of the optimizer.
        ratio: prune ratio, from 0 to 1.
        reset: function of (optimizer, params, ratio).
        keeps_counts: whether the Parameter's own step counts must stay.

    Raises:
        PropertyError: if any of these changes.

    Examples:
        >>> assert_reset_leaves_the_rest(Trained(torch.optim.AdamW), ratio=0.9)
    """
    (optimizer, params), (twin, same) = case(), case()
    reset(optimizer, params[:1], ratio)
    for p, q in zip(params, same, strict=True):
        if not torch.equal(p, q):
            raise PropertyError(
                "a reset must change the optimizer's state only; it changed a Parameter"
            )
    for p, q in zip(params[1:], same[1:], strict=True):
        if not equal(states_of(optimizer, p), states_of(twin, q)):
            raise PropertyError("a reset changed the state of a Parameter that was not given")
    if not equal(groups_of(optimizer), groups_of(twin)):
        raise PropertyError("a reset changed a group's hyperparameters")
    if keeps_counts and not equal(scalars_of(optimizer, params[0]), scalars_of(twin, same[0])):
        raise PropertyError("a reset changed the step count or another scalar state")
    case.step_(optimizer, params, case.steps)
    case.step_(twin, same, case.steps)
    if not all(torch.equal(p, q) for p, q in zip(params[1:], same[1:], strict=True)):
        raise PropertyError("a reset changed the next step of the other Parameters")


def assert_next_step_is_bounded(
    case: Trained, *, ratio: float = 0.5, reset: ResetFunction = reset_by_relora
) -> None:
    """Assert that a step with zero gradients after a reset is at most four times a usual step.

    A's gradient is zero while B is zero. If a reset keeps a first moment but zeroes its second
    moment, such a step is as large as lr m / eps.

    Args:
        case: factory of the optimizer.
        ratio: prune ratio, from 0 to 1.
        reset: function of (optimizer, params, ratio).

    Raises:
        PropertyError: if an entry moves farther.

    Examples:
        >>> assert_next_step_is_bounded(Trained(torch.optim.AdamW), ratio=0.9)
    """
    optimizer, params = case()
    usual = 0.0
    for number in range(case.steps, case.steps + 3):
        before = [p.detach().clone() for p in params]
        case.step_(optimizer, params, number)
        usual = max(usual, _farthest(params, before))
    before = [p.detach().clone() for p in params]
    reset(optimizer, params, ratio)
    moved_without_gradient(optimizer, params)
    leap = _farthest(params, before)
    if not leap <= 4 * usual:
        raise PropertyError(
            f"after a reset, a step with zero gradients moved an entry by {leap:.3g}; earlier "
            f"steps moved entries by at most {usual:.3g}: prune all moments of an entry together"
        )


def assert_reset_before_the_first_step(
    case: Trained, *, ratio: float = 0.5, reset: ResetFunction = reset_by_relora
) -> None:
    """Assert that a reset before the first step creates no state and changes no later step.

    `optimizer.state` is a defaultdict: reading `state[p]` creates an empty entry, and distributed
    checkpoints then load nothing.

    Args:
        case: factory of the optimizer; the steps are taken after the reset.
        ratio: prune ratio, from 0 to 1.
        reset: function of (optimizer, params, ratio).

    Raises:
        PropertyError: if the reset creates state, or a later step differs.

    Examples:
        >>> assert_reset_before_the_first_step(Trained(torch.optim.AdamW))
    """
    begun = dataclasses.replace(case, steps=0)
    (optimizer, params), (twin, same) = begun(), begun()
    reset(optimizer, params, ratio)
    for one, other in zip(inner_optimizers(optimizer), inner_optimizers(twin), strict=True):
        if len(one.state) != len(other.state):
            raise PropertyError("a reset before the first step created entries of the state")
    for number in range(case.steps):
        case.step_(optimizer, params, number)
        case.step_(twin, same, number)
    if not all(torch.equal(p, q) for p, q in zip(params, same, strict=True)):
        raise PropertyError("a reset before the first step changed later steps")


def assert_reset_commutes_with_saving(
    case: Trained, *, ratio: float = 0.5, reset: ResetFunction = reset_by_relora
) -> None:
    """Assert that a reset gives the same result before and after saving and loading.

    In either order, two further steps must equal those of an optimizer that was reset and never
    saved, bit for bit.

    Args:
        case: factory of the optimizer.
        ratio: prune ratio, from 0 to 1.
        reset: function of (optimizer, params, ratio).

    Raises:
        PropertyError: if the Parameters differ.

    Examples:
        >>> assert_reset_commutes_with_saving(Trained(torch.optim.AdamW), ratio=0.9)
    """
    ends = {}
    for order in ("never saved", "reset, then saved", "saved, then reset"):
        optimizer, params = case()
        if order == "reset, then saved":
            reset(optimizer, params, ratio)
        if order != "never saved":
            fresh, others = dataclasses.replace(case, steps=0)()
            with torch.no_grad():
                for p, q in zip(others, params, strict=True):
                    p.copy_(q)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer, params = fresh, others
        if order != "reset, then saved":
            reset(optimizer, params, ratio)
        for number in (case.steps, case.steps + 1):
            case.step_(optimizer, params, number)
        ends[order] = [p.detach().clone() for p in params]
    for order, values in ends.items():
        if not all(map(torch.equal, values, ends["never saved"])):
            raise PropertyError(f"an optimizer that was {order} must continue like one never saved")


def can_hold_nan(case: Trained) -> bool:
    """Whether the last Parameter has moments that are known and ordinary tensors."""
    optimizer, params = case()
    known = is_known(optimizer, params) and moments_of(optimizer, params[-1:])
    states = states_of(optimizer, params[-1])
    return bool(known) and any(is_plain(value) for state in states for value in state.values())


def assert_nan_is_refused(
    case: Trained, *, ratio: float = 0.5, reset: ResetFunction = reset_by_relora
) -> None:
    """Assert that a reset raises and changes nothing if moments hold NaN.

    Every comparison with NaN is false, so a NaN threshold silently zeroes the entire moment.

    Args:
        case: factory of the optimizer.
        ratio: prune ratio, from 0 to 1.
        reset: function of (optimizer, params, ratio).

    Raises:
        PropertyError: if the reset does not raise a ValueError, or the state changes.
        ValueError: if the last Parameter has no known, ordinary moment that could hold NaN.

    Examples:
        >>> assert_nan_is_refused(Trained(torch.optim.AdamW))
    """
    if not can_hold_nan(case):
        raise ValueError("the last Parameter must have moments that are known, ordinary tensors")
    optimizer, params = case()
    tensors = [t for s in states_of(optimizer, params[-1]) for t in s.values() if is_plain(t)]
    for tensor in tensors:
        if tensor.shape == params[-1].shape:
            tensor.view(-1)[0] = float("nan")
    before = [copied(state) for p in params for state in states_of(optimizer, p)]
    try:
        reset(optimizer, params, ratio)
    except ValueError:
        if not equal([s for p in params for s in states_of(optimizer, p)], before):
            raise PropertyError("a reset must not change the state before it refuses NaN") from None
        return
    raise PropertyError("a reset must raise a ValueError if a moment holds NaN; it did not")


def _farthest(params: Sequence[nn.Parameter], before: Sequence[Tensor]) -> float:
    return max(float((p.detach() - b).abs().max()) for p, b in zip(params, before, strict=True))

"""Assertions of the properties of a jagged schedule."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from relora_core.schedule import Restarts
from relora_core.testing.expressions import as_factory, written
from relora_core.testing.subjects import PropertyError

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]
Jagged = Callable[[LRScheduler, Restarts], LRScheduler]


@dataclass(frozen=True)
class Rates:
    """The learning rates of a jagged schedule and of its smooth schedule.

    Args:
        jagged: function that makes the schedule from a smooth schedule and the clock.
        inner: function that makes the smooth schedule for an optimizer.
        restarts: clock that says when restarts are due.
        steps: number of steps in the run.

    Examples:
        >>> from relora_core import JaggedLR
        >>> inner = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        >>> Rates(JaggedLR, inner, Restarts(every=3, warmup=2), steps=6).of_jagged()[0]
        [1.0, 1.0, 1.0, 0.0, 0.5, 1.0]
    """

    jagged: Jagged
    inner: Schedule
    restarts: Restarts
    steps: int

    def of_inner(self, *, halved_at: int | None = None) -> list[list[float]]:
        """Return the smooth schedule's rate of each group at each step.

        If `halved_at` is given, all rates are halved by hand before that step.
        """
        return self._walked(self.inner(_optimizer()), self.steps, halved_at=halved_at)

    def of_jagged(
        self, *, saved_at: int | None = None, told: bool = False, halved_at: int | None = None
    ) -> list[list[float]]:
        """Return the jagged schedule's rate of each group at each step.

        If `saved_at` is given, the schedule is saved and loaded at that step. If `told`, the rates
        are those of `get_last_lr()`. `halved_at` is the same as in `of_inner`.
        """
        schedule = self.jagged(self.inner(_optimizer()), self.restarts)
        if saved_at is None:
            return self._walked(schedule, self.steps, told=told, halved_at=halved_at)
        before = self._walked(schedule, saved_at)
        state = copy.deepcopy((schedule.state_dict(), schedule.optimizer.state_dict()))
        fresh = self.jagged(self.inner(_optimizer()), self.restarts)
        fresh.optimizer.load_state_dict(state[1])
        fresh.load_state_dict(state[0])
        after = self._walked(fresh, self.steps - saved_at)
        return [one + other for one, other in zip(before, after, strict=True)]

    def _walked(
        self,
        schedule: LRScheduler,
        steps: int,
        *,
        told: bool = False,
        halved_at: int | None = None,
    ) -> list[list[float]]:
        groups = schedule.optimizer.param_groups
        rates: list[list[float]] = [[] for _ in groups]
        metric = (1.0,) if isinstance(self.inner(_optimizer()), ReduceLROnPlateau) else ()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
            for step in range(steps):
                if step == halved_at:
                    for group in groups:
                        group["lr"] = group["lr"] / 2
                said = schedule.get_last_lr() if told else [group["lr"] for group in groups]
                for rate, own in zip(said, rates, strict=True):
                    own.append(float(rate))
                schedule.optimizer.step()
                schedule.step(*metric)
        return rates

    def __repr__(self) -> str:
        jagged, inner = written(self.jagged), as_factory(self.inner, "optimizer")
        return f"testing.Rates({jagged}, {inner}, relora.{self.restarts!r}, steps={self.steps})"


def assert_zero_at_restarts(case: Rates) -> None:
    """Assert that the rate is zero at the step of every restart, including the first.

    Args:
        case: run to check.

    Raises:
        PropertyError: if it is not zero; a step of normal size would then follow the merge.

    Examples:
        >>> from relora_core import JaggedLR
        >>> inner = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        >>> assert_zero_at_restarts(Rates(JaggedLR, inner, Restarts(every=3, warmup=2), steps=6))
    """
    for rates in case.of_jagged():
        for step, rate in enumerate(rates):
            if case.restarts.at(step) and rate != 0:
                raise PropertyError(f"the rate at the restart at step {step} is {rate:g}, not 0")


def assert_smooth_outside_ramps(case: Rates) -> None:
    """Assert that outside the ramps the rate is the smooth schedule's, to 1e-12.

    Args:
        case: run to check.

    Raises:
        PropertyError: if the rate differs, for example because ramps compound.

    Examples:
        >>> from relora_core import JaggedLR
        >>> inner = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        >>> assert_smooth_outside_ramps(Rates(JaggedLR, inner, Restarts(every=3, warmup=2), 6))
    """
    for rates, smooth in zip(case.of_jagged(), case.of_inner(), strict=True):
        for step, (rate, plain) in enumerate(zip(rates, smooth, strict=True)):
            if case.restarts.factor(step) == 1 and not math.isclose(rate, plain, rel_tol=1e-12):
                raise PropertyError(
                    f"the rate at step {step}, outside the ramps, must be the smooth schedule's "
                    f"{plain:g}; got {rate:g}"
                )


def assert_ramps_rise(case: Rates) -> None:
    """Assert that rates in a ramp are between zero and the smooth rates nearby, and that they rise.

    After a restart, the ratio of the rate to the smooth rate must grow with each step until the end
    of the warm-up.

    Args:
        case: run to check.

    Raises:
        PropertyError: if a rate is negative or larger than every smooth rate nearby, or the ratio
            does not grow.

    Examples:
        >>> from relora_core import JaggedLR
        >>> inner = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        >>> assert_ramps_rise(Rates(JaggedLR, inner, Restarts(every=3, warmup=2), steps=6))
    """
    clock = case.restarts
    for rates, smooth in zip(case.of_jagged(), case.of_inner(), strict=True):
        for step, rate in enumerate(rates):
            reach = clock.warmup + clock.anneal
            largest = max(smooth[max(0, step - reach) : step + reach + 1])
            if not 0 <= rate <= largest * (1 + 1e-12):
                raise PropertyError(
                    f"the rate at step {step} must be from 0 to {largest:g}, the largest smooth "
                    f"rate nearby; got {rate:g}"
                )
            warming = any(clock.at(step - since) for since in range(1, clock.warmup + 1))
            if warming and smooth[step - 1] > 0 and smooth[step] > 0:
                before, share = rates[step - 1] / smooth[step - 1], rate / smooth[step]
                if not before < share:
                    raise PropertyError(
                        f"the ratio of the rate to the smooth rate must grow until the end of the "
                        f"warm-up; at step {step} it goes from {before:g} to {share:g}"
                    )


def assert_rate_is_told(case: Rates) -> None:
    """Assert that `get_last_lr()` returns the rate of each group at every step.

    Args:
        case: run to check.

    Raises:
        PropertyError: if it returns another rate.

    Examples:
        >>> from relora_core import JaggedLR
        >>> inner = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        >>> assert_rate_is_told(Rates(JaggedLR, inner, Restarts(every=3, warmup=2), steps=6))
    """
    told = case.of_jagged(told=True)
    for rates, own in zip(case.of_jagged(), told, strict=True):
        for step, (rate, said) in enumerate(zip(rates, own, strict=True)):
            if rate != said:
                raise PropertyError(
                    f"get_last_lr() at step {step} must be the rate, {rate:g}; got {said:g}"
                )


def assert_schedule_resumes(case: Rates, *, at: int) -> None:
    """Assert that a new schedule continues exactly from a state saved at step `at`.

    Args:
        case: run to check.
        at: step at which the schedule and the optimizer are saved and loaded.

    Raises:
        PropertyError: if a later rate differs.

    Examples:
        >>> from relora_core import JaggedLR
        >>> inner = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        >>> assert_schedule_resumes(Rates(JaggedLR, inner, Restarts(every=3, warmup=2), 6), at=3)
    """
    for rates, resumed in zip(case.of_jagged(), case.of_jagged(saved_at=at), strict=True):
        for step, (rate, again) in enumerate(zip(rates, resumed, strict=True)):
            if rate != again:
                raise PropertyError(
                    f"a schedule saved and loaded at step {at} gives {again:g} at step {step}; one "
                    f"never saved gives {rate:g}"
                )


def assert_hand_changed_rate_is_kept(case: Rates, *, at: int) -> None:
    """Assert that a rate changed by hand is kept as the smooth schedule would keep it.

    Args:
        case: run to check.
        at: step before which the rates are halved by hand; it must be outside the ramps.

    Raises:
        PropertyError: if a later rate outside the ramps differs from the smooth schedule's.

    Examples:
        >>> from relora_core import JaggedLR
        >>> inner = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        >>> case = Rates(JaggedLR, inner, Restarts(every=3, warmup=2), 6)
        >>> assert_hand_changed_rate_is_kept(case, at=1)
    """
    both = zip(case.of_jagged(halved_at=at), case.of_inner(halved_at=at), strict=True)
    for rates, smooth in both:
        for step in range(at, case.steps):
            full = case.restarts.factor(step) == 1
            if full and not math.isclose(rates[step], smooth[step], rel_tol=1e-12):
                raise PropertyError(
                    f"after the rate is halved by hand before step {at}, the rate at step {step} "
                    f"must be the smooth schedule's {smooth[step]:g}; got {rates[step]:g}"
                )


def _optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.25)]
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

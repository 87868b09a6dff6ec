"""The check of restarts: against Algorithm 1, and for leftovers of the old factors."""

import functools
from collections.abc import Callable, Collection

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from relora_core.testing.checks.runner import CI, Checks, Held
from relora_core.testing.expressions import code, written
from relora_core.testing.machine import RestartMachine
from relora_core.testing.properties import restarts as leftovers
from relora_core.testing.properties.restarts import Restart, restart_by_relora
from relora_core.testing.properties.schedules import Jagged

_BEGIN = "state = Machine()"  # the first line of hypothesis' notes on a failing run


_ALGORITHM = "a training is Algorithm 1, whatever interrupts it"
_LEFTOVERS: dict[str, Callable[..., None]] = {
    "no gradient of the old factors is used": leftovers.assert_no_old_gradient_is_used,
    "moments of frozen factors are reset": leftovers.assert_frozen_moments_are_reset,
    "what shares W keeps its value": leftovers.assert_second_owners_are_safe,
    "several optimizers are all reset": leftovers.assert_several_optimizers_are_reset,
    "one that is broken off is finished or refused": leftovers.assert_broken_off_is_found,
}


def check_restart(
    restart: Restart = restart_by_relora,
    *,
    jagged: Jagged = RestartMachine.jagged,
    skip: Collection[str] = (),
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check that a restart follows Algorithm 1, in a training run with all kinds of interruptions.

    The check runs `RestartMachine`, which compares the model, AdamW, the schedule and the clock
    with the paper's algorithm in plain float64. It also checks that nothing computed from the old
    factors remains: gradients, moments, other modules that share W, and an interrupted restart. In
    each of these cases the restart may raise an error instead.

    Args:
        restart: function of (model, optimizer, ratio); this library's `restart_` by default.
        jagged: function that makes the schedule from a smooth schedule and the clock.
        skip: properties to leave out.
        profile: `CI`, `DEEP`, or your own hypothesis settings.

    Returns:
        The properties that held, each with its number of examples.

    Raises:
        PropertyError: if a property does not hold; the message contains the shortest failing run.

    Examples:
        >>> held = check_restart(profile=hypothesis.settings(CI, max_examples=2))
        >>> [one.property for one in held][:2]  # doctest: +NORMALIZE_WHITESPACE
        ['a training is Algorithm 1, whatever interrupts it',
         'no gradient of the old factors is used']
    """
    begun = 0

    class Machine(RestartMachine):
        def __init__(self) -> None:
            super().__init__()
            nonlocal begun
            begun += 1

    Machine.restart, Machine.jagged = staticmethod(restart), staticmethod(jagged)
    checks = Checks(profile, [_ALGORITHM, *_LEFTOVERS], skip)
    if _ALGORITHM not in skip:
        told = checks.telling(_ALGORITHM, functools.partial(_show, restart, jagged))
        with torch.random.fork_rng(devices=[]), told:
            # At normal verbosity, hypothesis adds the steps of the shortest run as notes.
            normal = hypothesis.Verbosity.normal
            noted = hypothesis.settings(profile, verbosity=normal, print_blob=False)
            run_state_machine_as_test(Machine, settings=noted)
        checks.held.append(Held(_ALGORITHM, begun))
    for prop, assertion in _LEFTOVERS.items():
        check = functools.partial(_check, restart, assertion)
        show = functools.partial(_show_leftover, restart, assertion)
        checks.check(prop, st.integers(0, 3), check, show)
    return checks.held


def _check(restart: Restart, assertion: Callable[..., None], seed: int) -> bool:
    assertion(restart, seed=seed)
    return True


def _show_leftover(restart: Restart, assertion: Callable[..., None], seed: int) -> str:
    call = f"testing.{assertion.__name__}({written(restart)}, seed={seed})"
    return code([call], restart)


def _show(restart: Restart, jagged: Jagged, error: Exception) -> str:
    notes = getattr(error, "__notes__", [])
    lines = [
        "class Machine(testing.RestartMachine):",
        f"    restart = staticmethod({written(restart)})",
        f"    jagged = staticmethod({written(jagged)})",
        "",
        "",
        *(notes[notes.index(_BEGIN) :] if _BEGIN in notes else []),
    ]
    return code(lines, restart, jagged)

"""The check of whole restarts: against Algorithm 1, and for leftovers of old factors."""

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

_BEGIN = "state = Machine()"  # of the steps of a machine's run, which are notes of the error


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
    """Check that a restart is Algorithm 1's, in a training that is interrupted in every way.

    Runs `RestartMachine`: model, AdamW, schedule and clock against a plain float64 model of the
    paper's algorithm. And checks that nothing that was made of the old factors outlives them:
    gradients, moments, other owners of W, a restart that was broken off; each may be refused.

    Args:
        restart: of (model, optimizer, ratio), if it is not this library's `restart_`.
        jagged: makes the schedule from a smooth one and the clock.
        skip: properties to leave out.
        profile: `CI`, `DEEP` or settings of hypothesis of your own.

    Returns:
        What held, and on how many examples.

    Raises:
        PropertyError: if it is another algorithm, with the shortest run of it that was found.

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
            # The steps of the shortest run are among the notes that it makes then.
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

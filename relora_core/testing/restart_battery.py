"""The battery for whole restarts: a machine against Algorithm 1."""

import functools

import hypothesis
import torch
from hypothesis.stateful import run_state_machine_as_test

from relora_core.testing.expressions import code, written
from relora_core.testing.jags import Jagged
from relora_core.testing.machine import Restart, RestartMachine, restart_by_relora
from relora_core.testing.runner import CI, Battery, Held

_BEGIN = "state = Machine()"  # of the steps of a machine's run, which are notes of the error


def check_restart(
    restart: Restart = restart_by_relora,
    *,
    jagged: Jagged = RestartMachine.jagged,
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check that a restart is Algorithm 1's, in a training that is interrupted in every way.

    Runs `RestartMachine`: model, AdamW, schedule and clock against a plain float64 model of the
    paper's algorithm.

    Args:
        restart: of (model, optimizer, ratio), if it is not this library's `restart_`.
        jagged: makes the schedule from a smooth one and the clock.
        profile: `CI`, `DEEP` or settings of hypothesis of your own.

    Returns:
        What held, and on how many examples.

    Raises:
        BrokenPromiseError: if it is another algorithm, with the shortest run of it that was found.

    Examples:
        >>> held = check_restart(profile=hypothesis.settings(CI, max_examples=2))
        >>> [one.promise for one in held]
        ['a training is Algorithm 1, whatever interrupts it']
    """
    begun = 0

    class Machine(RestartMachine):
        def __init__(self) -> None:
            super().__init__()
            nonlocal begun
            begun += 1

    Machine.restart, Machine.jagged = staticmethod(restart), staticmethod(jagged)
    promise = "a training is Algorithm 1, whatever interrupts it"
    told = Battery(profile, [promise]).telling(promise, functools.partial(_show, restart, jagged))
    with torch.random.fork_rng(devices=[]), told:
        # The steps of the shortest run are among the notes that it makes then.
        normal = hypothesis.Verbosity.normal
        noted = hypothesis.settings(profile, verbosity=normal, print_blob=False)
        run_state_machine_as_test(Machine, settings=noted)
    return [Held(promise, begun)]


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

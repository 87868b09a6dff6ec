"""The check of jagged schedules."""

import functools
from collections.abc import Callable, Collection

import hypothesis
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from relora_core.schedule import Restarts
from relora_core.testing.checks.runner import CI, Checks, Held
from relora_core.testing.expressions import Call, code
from relora_core.testing.properties import schedules as jags
from relora_core.testing.properties.schedules import Jagged, Rates, Schedule
from relora_core.testing.strategies.training import clocks, schedules

_MORE = 12  # steps past the second restart
_PROPERTIES: list[tuple[str, Callable[..., None]]] = [
    ("the rate at each restart is zero", jags.assert_zero_at_restarts),
    ("outside the ramps it is the smooth schedule's", jags.assert_smooth_outside_ramps),
    ("inside a ramp it lies between, and rises from each restart", jags.assert_ramps_rise),
    ("it tells the rate that it sets", jags.assert_rate_is_told),
    ("it resumes exactly from any step", jags.assert_schedule_resumes),
    (
        "a rate that is changed by hand is kept as the smooth schedule keeps it",
        jags.assert_hand_changed_rate_is_kept,
    ),
]


def check_schedule(
    jagged: Jagged,
    *,
    inner: Schedule | SearchStrategy[Call] | None = None,
    restarts: Restarts | SearchStrategy[Restarts] | None = None,
    skip: Collection[str] = (),
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check all properties of a jagged schedule.

    The properties are:

    - The rate is zero at each restart.
    - Outside the ramps it is the smooth schedule's; in a ramp it is between zero and that rate, and
      it rises from each restart.
    - `get_last_lr()` returns the rate that is set.
    - The schedule resumes exactly from any step.
    - A rate that is changed by hand is kept as the smooth schedule keeps it.

    Args:
        jagged: function that makes the schedule from a smooth schedule and the clock.
        inner: factory of the smooth schedule, a function of an optimizer, or a strategy of
            factories; None for every scheduler in torch. Runs go past the second restart.
        restarts: clock, or a strategy of clocks; None for any clock.
        skip: properties to leave out.
        profile: `CI`, `DEEP`, or your own hypothesis settings.

    Returns:
        The properties that held, each with its number of examples.

    Raises:
        PropertyError: if a property does not hold; the message contains the smallest failing case
            as runnable code. Later properties are not checked.

    Examples:
        >>> from relora_core import JaggedLR
        >>> held = check_schedule(JaggedLR, profile=hypothesis.settings(CI, max_examples=2))
        >>> held[0].property
        'the rate at each restart is zero'
    """
    restarts = clocks() if restarts is None else restarts
    longest = _steps(restarts, _MORE) if isinstance(restarts, Restarts) else 60
    inner = schedules(longest) if inner is None else inner
    inners = inner if isinstance(inner, SearchStrategy) else st.just(inner)
    times = restarts if isinstance(restarts, SearchStrategy) else st.just(restarts)
    rates = st.builds(functools.partial(_rates, jagged), inners, times, st.integers(1, _MORE))
    checks = Checks(profile, [words for words, _ in _PROPERTIES], skip)
    for words, assertion in _PROPERTIES:
        cases = rates.flatmap(_AT.get(assertion, _never_saved))
        check = functools.partial(_check, assertion)
        checks.check(words, cases, check, functools.partial(_show, assertion))
    return checks.held


def _rates(jagged: Jagged, inner: Schedule, restarts: Restarts, more: int) -> Rates:
    return Rates(jagged, inner, restarts, _steps(restarts, more))


def _steps(restarts: Restarts, more: int) -> int:
    """Return the length of a run that ends `more` steps past the second restart."""
    return restarts.full_until + restarts.anneal + restarts.every + more


def _never_saved(case: Rates) -> SearchStrategy[tuple[Rates, dict[str, int]]]:
    return st.just((case, {}))


def _saved(case: Rates) -> SearchStrategy[tuple[Rates, dict[str, int]]]:
    return st.integers(0, case.steps).map(lambda at: (case, {"at": at}))


def _changed(case: Rates) -> SearchStrategy[tuple[Rates, dict[str, int]]]:
    full = [step for step in range(case.steps) if case.restarts.factor(step) == 1]
    return st.sampled_from(full).map(lambda at: (case, {"at": at}))


_AT = {
    jags.assert_schedule_resumes: _saved,
    jags.assert_hand_changed_rate_is_kept: _changed,
}


def _check(assertion: Callable[..., None], drawn: tuple[Rates, dict[str, int]]) -> bool:
    case, options = drawn
    assertion(case, **options)
    return True


def _show(assertion: Callable[..., None], drawn: tuple[Rates, dict[str, int]]) -> str:
    case, options = drawn
    given = ["case", *(f"{key}={value}" for key, value in options.items())]
    call = f"testing.{assertion.__name__}({', '.join(given)})"
    return code([f"case = {case!r}", call], case.jagged, case.inner)

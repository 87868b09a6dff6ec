"""The batteries: every promise over what hypothesis draws, down to the smallest that fails."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from hypothesis.strategies import SearchStrategy
from torch import nn

from relora_core.schedule import Restarts
from relora_core.sites import low_rank_sites
from relora_core.testing import jags, promises, resets
from relora_core.testing.calls import Call, as_factory, code, written
from relora_core.testing.histories import Event, given_inputs, lived
from relora_core.testing.jags import Jagged, Rates, Schedule
from relora_core.testing.machine import Restart, RestartMachine, restart
from relora_core.testing.resets import OptimizerFactory, Reset, Trained
from relora_core.testing.strategies import (
    clocks,
    histories,
    ratios,
    schedules,
    shapes,
    with_sites,
)
from relora_core.testing.subjects import (
    BrokenPromiseError,
    Inputs,
    Sites,
    find_sites,
    has_sites,
)

_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "report_multiple_bugs": False,
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
    "verbosity": hypothesis.Verbosity.quiet,
}
#: Seconds: the same examples every time.
CI = hypothesis.settings(max_examples=25, derandomize=True, stateful_step_count=15, **_COMMON)
#: Minutes: new examples every time.
DEEP = hypothesis.settings(max_examples=4000, stateful_step_count=40, **_COMMON)

MakeModule = Callable[[], nn.Module]


@dataclass(frozen=True)
class Held:
    """A promise that held.

    Args:
        promise: in words.
        examples: on how many it was looked at.
    """

    promise: str
    examples: int


def check_low_rank(
    make: MakeModule | SearchStrategy[Call],
    *,
    targets: str | list[str] = "*",
    inputs: Inputs | None = None,
    sites: Sites = find_sites,
    may_lose: float = 0.05,
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check everything that a module with low-rank weights promises.

    That it computes with W + s B A, and so do its gradients; that a merge keeps the function,
    rounds W once, changes nothing else, and can be done twice; that small merges are not lost;
    that redraws depend on their key alone; that every factor learns, and the rank of what is
    learned grows; that states save and load, and copies are copies. After any history of steps,
    merges, redraws, saves, loads, copies and moves.

    Args:
        make: your module's factory, or a strategy of factories (see `calls`). A module that has no
            site yet gets sites at `targets`, of drawn rank, scale and seed.
        targets: as of `add_low_rank_`.
        inputs: of one call, for the module: a tensor or a tuple of them; `example_inputs` if None.
        sites: finds the sites of layers of your own, see `LowRankSite`.
        may_lose: the fraction that ten small merges may lose. A W of 16 bits that is not split
            loses more than half: 1 says that you know.
        profile: `CI`, `DEEP` or settings of hypothesis of your own.

    Returns:
        What held, and on how many examples.

    Raises:
        BrokenPromiseError: at the first promise that does not hold, with the smallest case that was
            found, as code that runs.

    Example:
        >>> held = check_low_rank(lambda: nn.Linear(3, 2), profile=hypothesis.settings(
        ...     CI, max_examples=2))
        >>> [one.promise for one in held][:2]
        ['it computes with W + s B A', 'its gradients are those of W + s B A']
    """
    factories = make if isinstance(make, SearchStrategy) else st.just(make)
    factories = factories.flatmap(lambda one: _sited(one, targets, sites))
    battery: dict[str, tuple[Callable[..., None], str]] = {
        "it computes with W + s B A": (promises.assert_is_dense, "x"),
        "its gradients are those of W + s B A": (promises.assert_gradients_are_dense, "x"),
        "a merge keeps the function": (promises.assert_merge_keeps_function, "x"),
        "a merge adds s B A to W, rounds once, and zeroes B": (
            promises.assert_merge_adds_update,
            "",
        ),
        "merging twice is merging once": (promises.assert_merge_is_idempotent, ""),
        "a redraw depends on its key alone": (promises.assert_redraw_is_keyed, ""),
        "every factor learns in every cycle": (promises.assert_learns, "x new"),
        "the rank grows with each restart, within its bound": (promises.assert_rank_grows, ""),
        "small merges are not lost": (
            functools.partial(promises.assert_merges_add_up, may_lose=may_lose),
            "",
        ),
        "saving and loading commute with restarts": (promises.assert_saves_and_loads, "x make"),
        "forward passes and copies change nothing": (promises.assert_copies_are_independent, "x"),
        "register and remove cancel": (promises.assert_removal_cancels, "x ours"),
    }
    held: list[Held] = []
    for promise, (assertion, needs) in battery.items():
        case = st.fixed_dictionaries(
            {
                "make": factories,
                "events": st.just([]) if "new" in needs else histories(),
                "seed": st.integers(0, 3),
            }
        )
        look = _of_module(assertion, needs, inputs, sites)
        held.append(_look(promise, case, *look, profile, held))
    return held


def check_resettable(
    make: OptimizerFactory | SearchStrategy[Call],
    *,
    reset: Reset = resets.reset,
    prune_ratios: SearchStrategy[float] | None = None,
    sizes: SearchStrategy[tuple[tuple[int, ...], ...]] | None = None,
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check everything that an optimizer and a reset of its moments promise.

    That a full reset leaves nothing by which a step could move; that a ratio zeroes its share,
    ties or none, beyond 2**24 entries too, and keeps the bits of the rest; that other Parameters,
    groups and counts stay; that the next step is bounded; that a reset before the first step does
    nothing; that it commutes with saving; that it refuses NaN.

    Args:
        make: your optimizer's factory, from a list of Parameters, or a strategy of factories (see
            `calls`).
        reset: of (optimizer, params, ratio), if it is not this library's.
        prune_ratios: to draw from; `st.just(1.0)` for what can only be reset whole.
        sizes: to draw the Parameters' shapes from.
        profile: `CI`, `DEEP` or settings of hypothesis of your own.

    Returns:
        What held, and on how many examples.

    Raises:
        BrokenPromiseError: at the first promise that does not hold, with the smallest case that was
            found, as code that runs.

    Example:
        >>> make = lambda params: torch.optim.AdamW(params, lr=0.01)
        >>> few = hypothesis.settings(CI, max_examples=2)
        >>> held = check_resettable(make, prune_ratios=ratios(), profile=few)
        >>> held[0].promise
        'a full reset leaves nothing by which a step could move'
    """
    factories = make if isinstance(make, SearchStrategy) else st.just(make)
    drawn = st.builds(
        Trained,
        factories,
        shapes=sizes if sizes is not None else shapes(),
        steps=st.integers(1, 4),
        seed=st.integers(0, 9),
        ties=st.booleans(),
    )
    share = prune_ratios if prune_ratios is not None else ratios()
    battery: dict[str, tuple[Callable[..., None], bool]] = {
        "a full reset leaves nothing by which a step could move": (
            resets.assert_full_reset_stands_still,
            False,
        ),
        "a ratio zeroes its share, and keeps the bits of the rest": (
            resets.assert_prune_keeps_its_share,
            True,
        ),
        "a reset leaves all else": (resets.assert_reset_leaves_the_rest, True),
        "the step after a reset is bounded": (resets.assert_next_step_is_bounded, True),
        "a reset before the first step does nothing": (
            resets.assert_reset_before_the_first_step,
            False,
        ),
        "a reset commutes with saving": (resets.assert_reset_commutes_with_saving, True),
        "moments that hold NaN are refused": (resets.assert_nan_is_refused, True),
    }
    held: list[Held] = []
    for promise, (assertion, has_ratio) in battery.items():
        case = st.fixed_dictionaries({"case": drawn, **({"ratio": share} if has_ratio else {})})

        def look(
            case: Trained, *, assertion: Callable[..., None] = assertion, **options: float
        ) -> None:
            assertion(case, **options, reset=reset)

        def show(
            case: Trained, *, assertion: Callable[..., None] = assertion, **options: float
        ) -> str:
            given = [f"{key}={value!r}" for key, value in options.items()]
            given += [] if reset is resets.reset else [f"reset={written(reset)}"]
            call = f"testing.{assertion.__name__}({', '.join(['case', *given])})"
            return code([f"case = {case!r}", call], case.factory, reset)

        held.append(_look(promise, case, look, show, profile, held))
    if prune_ratios is None and sizes is None:
        once = hypothesis.settings(profile, max_examples=1)
        case = st.fixed_dictionaries({"factory": factories})

        def look_large(factory: OptimizerFactory) -> None:
            resets.assert_any_size_is_pruned(factory, reset=reset)

        def show_large(factory: OptimizerFactory) -> str:
            arguments = f"{as_factory(factory, 'params')}, reset={written(reset)}"
            return code([f"testing.assert_any_size_is_pruned({arguments})"], factory, reset)

        promise = "a ratio zeroes its share of more than 2**24 entries"
        held.append(_look(promise, case, look_large, show_large, once, held))
    return held


def check_schedule(
    jagged: Jagged,
    *,
    inner: Schedule | SearchStrategy[Call] | None = None,
    restarts: Restarts | SearchStrategy[Restarts] | None = None,
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check everything that a jagged schedule promises.

    That the rate is zero at each restart, the smooth schedule's outside the ramps and between them
    inside, and that it resumes exactly from any step.

    Args:
        jagged: makes the schedule from a smooth one and the clock.
        inner: makes the smooth schedule for an optimizer, or a strategy of such factories; every
            scheduler that torch ships if None.
        restarts: the clock, or a strategy of clocks; any if None.
        profile: `CI`, `DEEP` or settings of hypothesis of your own.

    Returns:
        What held, and on how many examples.

    Raises:
        BrokenPromiseError: at the first promise that does not hold, with the smallest case that was
            found, as code that runs.

    Example:
        >>> from relora_core import JaggedLR
        >>> held = check_schedule(JaggedLR, profile=hypothesis.settings(CI, max_examples=2))
        >>> held[0].promise
        'the rate at each restart is zero'
    """
    inners = schedules() if inner is None else inner
    times = clocks() if restarts is None else restarts
    drawn = st.builds(
        Rates,
        st.just(jagged),
        inners if isinstance(inners, SearchStrategy) else st.just(inners),
        times if isinstance(times, SearchStrategy) else st.just(times),
        st.integers(1, 60),
    )
    battery: dict[str, Callable[..., None]] = {
        "the rate at each restart is zero": jags.assert_zero_at_restarts,
        "outside the ramps it is the smooth schedule's": jags.assert_smooth_outside_ramps,
        "inside a ramp it lies between": jags.assert_ramps_lie_between,
        "it resumes exactly from any step": jags.assert_schedule_resumes,
    }
    held: list[Held] = []
    for promise, assertion in battery.items():
        resumes = assertion is jags.assert_schedule_resumes
        case = st.fixed_dictionaries(
            {"case": drawn, **({"at": st.integers(0, 60)} if resumes else {})}
        )

        def look(
            case: Rates, *, assertion: Callable[..., None] = assertion, at: int | None = None
        ) -> None:
            assertion(case, **({} if at is None else {"at": min(at, case.steps)}))

        def show(
            case: Rates, *, assertion: Callable[..., None] = assertion, at: int | None = None
        ) -> str:
            more = "" if at is None else f", at={min(at, case.steps)}"
            call = f"testing.{assertion.__name__}(case{more})"
            return code([f"case = {case!r}", call], jagged, case.inner)

        held.append(_look(promise, case, look, show, profile, held))
    return held


def check_restart(
    restart: Restart = restart,
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

    Example:
        >>> held = check_restart(profile=hypothesis.settings(CI, max_examples=2))
        >>> [one.promise for one in held]
        ['a training is Algorithm 1, whatever interrupts it']
    """
    begun = [0]

    class Machine(RestartMachine):
        def __init__(self) -> None:
            super().__init__()
            begun[0] += 1

    Machine.restart, Machine.jagged = staticmethod(restart), staticmethod(jagged)
    promise = "a training is Algorithm 1, whatever interrupts it"
    with _Told(promise, []) as told:
        told.show = lambda: machine_code(restart, jagged)
        # The steps of the shortest run are among the notes that it makes then.
        normal = hypothesis.settings(profile, verbosity=hypothesis.Verbosity.normal)
        run_state_machine_as_test(Machine, settings=normal)
    return [Held(promise, begun[0])]


def machine_code(restart: Restart, jagged: Jagged) -> str:
    """Return how the machine of `check_restart` is made."""
    lines = [
        "class Machine(testing.RestartMachine):",
        f"    restart = staticmethod({written(restart)})",
        f"    jagged = staticmethod({written(jagged)})",
        "",
        "",
        "",
    ]
    return code(lines, restart, jagged)


_BEGIN = "state = Machine()"  # of the steps of a machine's run, which are notes of the error


class _Told:
    """Turns what is raised within into a BrokenPromiseError that says all there is to say."""

    def __init__(self, promise: str, held: list[Held]) -> None:
        self.promise = promise
        self.held = held
        self.show: Callable[[], str] = str

    def __enter__(self) -> "_Told":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception):
            return
        said = str(error) if isinstance(error, BrokenPromiseError) else f"{kind.__name__}: {error}"  # type: ignore[union-attr]
        program = self.show()
        notes = getattr(error, "__notes__", [])
        program += "\n".join(notes[notes.index(_BEGIN) :] if _BEGIN in notes else [])
        before = "".join(f"\n  held: {one.promise} ({one.examples} examples)" for one in self.held)
        shown = "\n".join(f"    {line}" if line else "" for line in program.splitlines())
        raise BrokenPromiseError(
            f"broken: {self.promise}\n  {said}\n\nThe smallest case that was found, as code:\n\n"
            f"{shown}\n{before}"
        ) from error


def _look(
    promise: str,
    case: SearchStrategy[dict[str, Any]],
    look: Callable[..., None],
    show: Callable[..., str],
    profile: hypothesis.settings,
    held: list[Held],
) -> Held:
    """Look at one promise, and return that it held."""
    seen: list[dict[str, Any]] = []
    count = 0

    @profile
    @hypothesis.given(case)
    def promised(drawn: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        seen[:] = [drawn]
        state = torch.random.get_rng_state()
        try:
            look(**drawn)
        finally:
            torch.random.set_rng_state(state)

    with _Told(promise, held) as told:
        told.show = lambda: show(**seen[-1]) if seen else ""
        promised()
    return Held(promise, count)


def _sited(make: MakeModule, targets: str | list[str], sites: Sites) -> SearchStrategy[MakeModule]:
    """Return factories of the module with sites: its own, or drawn ones at `targets`."""
    state = torch.random.get_rng_state()
    model = make()
    torch.random.set_rng_state(state)
    if sites is not find_sites or has_sites(model):
        return st.just(make)
    return with_sites(make if isinstance(make, Call) else Call(make), targets)


def _of_module(
    assertion: Callable[..., None], needs: str, inputs: Inputs | None, sites: Sites
) -> tuple[Callable[..., None], Callable[..., str]]:
    name = getattr(assertion, "func", assertion).__name__

    def look(make: MakeModule, events: list[Event], seed: int) -> None:
        model = lived(make, events, seed=seed, inputs=inputs, sites=sites)
        if "ours" in needs and not any(low_rank_sites(model)):
            return
        more: list[Any] = [make] if "make" in needs else []
        x = given_inputs(model, inputs, seed) if "x" in needs.split() else ()
        options = {} if "ours" in needs else {"sites": sites}
        assertion(model, *more, *x, **options)

    def show(make: MakeModule, events: list[Event], seed: int) -> str:
        known = "" if inputs is None else f", inputs={written(inputs)}"
        known += "" if sites is find_sites else f", sites={written(sites)}"
        lines = [f"factory = {as_factory(make)}"]
        lines.append(f"model = testing.lived(factory, {events!r}, seed={seed}{known})")
        arguments = ["model"] + (["factory"] if "make" in needs else [])
        if "x" in needs.split():
            given = f", {written(inputs)}" if inputs is not None else ""
            lines.append(f"x = testing.given_inputs(model{given or ', None'}, {seed})")
            arguments.append("*x")
        if sites is not find_sites and "ours" not in needs:
            arguments.append(f"sites={written(sites)}")
        for key, value in getattr(assertion, "keywords", {}).items():
            arguments.append(f"{key}={value!r}")
        lines.append(f"testing.{name}({', '.join(arguments)})")
        return code(lines, make, inputs, sites)

    return look, show

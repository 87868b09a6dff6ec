"""The battery for modules with low-rank weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from relora_core.sites import low_rank_sites
from relora_core.testing import lifetimes, merges, redraws
from relora_core.testing.calls import Call, as_factory, code, written
from relora_core.testing.histories import Event, lived
from relora_core.testing.inputs import Inputs, given_inputs
from relora_core.testing.modules import histories, with_sites
from relora_core.testing.runner import CI, Battery, Held
from relora_core.testing.subjects import Sites, find_sites, has_sites


@dataclass(frozen=True)
class _Promise:
    words: str
    assertion: Callable[..., None]
    inputs: bool = True  # whether it takes those of a call
    factory: bool = False
    new: bool = False  # of a module that has been through nothing
    ours: bool = False  # of this library's sites only


_PROMISES = [
    _Promise("it computes with W + s B A", merges.assert_is_dense),
    _Promise("its gradients are those of W + s B A", merges.assert_gradients_are_dense),
    _Promise("a merge keeps the function", merges.assert_merge_keeps_function),
    _Promise(
        "a merge adds s B A to W, rounds once, and zeroes B",
        merges.assert_merge_adds_update,
        inputs=False,
    ),
    _Promise("merging twice is merging once", merges.assert_merge_is_idempotent, inputs=False),
    _Promise("a redraw depends on its key alone", redraws.assert_redraw_is_keyed, inputs=False),
    _Promise("every factor learns in every cycle", redraws.assert_learns, new=True),
    _Promise(
        "the rank grows with each restart, within its bound",
        redraws.assert_rank_grows,
        inputs=False,
    ),
    _Promise("small merges are not lost", merges.assert_merges_add_up, inputs=False),
    _Promise(
        "saving and loading commute with restarts",
        lifetimes.assert_saves_and_loads,
        factory=True,
    ),
    _Promise("forward passes and copies change nothing", lifetimes.assert_copies_are_independent),
    _Promise("register and remove cancel", lifetimes.assert_removal_cancels, ours=True),
]


@dataclass(frozen=True)
class _Case:
    make: Callable[[], nn.Module]
    events: list[Event]
    seed: int


def check_low_rank(
    make: Callable[[], nn.Module] | SearchStrategy[Call],
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
    subject = _Subject(inputs, sites, may_lose)
    battery = Battery(profile)
    for promise in _PROMISES:
        events = st.just([]) if promise.new else histories()
        cases = st.builds(_Case, factories, events, st.integers(0, 3))
        check = functools.partial(subject.check, promise)
        battery.look(promise.words, cases, check, functools.partial(subject.show, promise))
    return battery.held


@dataclass(frozen=True)
class _Subject:
    inputs: Inputs | None
    sites: Sites
    may_lose: float

    def check(self, promise: _Promise, case: _Case) -> None:
        known: dict[str, Any] = {"inputs": self.inputs, "sites": self.sites}
        model = lived(case.make, case.events, seed=case.seed, **known)
        if promise.ours and not any(low_rank_sites(model)):
            return
        factory = [case.make] if promise.factory else []
        x = given_inputs(model, self.inputs, seed=case.seed) if promise.inputs else ()
        promise.assertion(model, *factory, *x, **self._options(promise))

    def show(self, promise: _Promise, case: _Case) -> str:
        """Return the code that does what `check` does."""
        inputs = "" if self.inputs is None else written(self.inputs)
        sites = "" if self.sites is find_sites else f", sites={written(self.sites)}"
        known = (f", inputs={inputs}" if inputs else "") + sites
        events = f"{case.events!r}, seed={case.seed}"
        lines = [f"factory = {as_factory(case.make)}"]
        lines.append(f"model = testing.lived(factory, {events}{known})")
        arguments = ["model", "factory"] if promise.factory else ["model"]
        if promise.inputs:
            given = ", ".join(["model", *filter(None, [inputs]), f"seed={case.seed}"])
            lines.append(f"x = testing.given_inputs({given})")
            arguments.append("*x")
        options = {k: v for k, v in self._options(promise).items() if v is not find_sites}
        arguments += [f"{key}={written(value)}" for key, value in options.items()]
        lines.append(f"testing.{promise.assertion.__name__}({', '.join(arguments)})")
        return code(lines, case.make, self.inputs, self.sites)

    def _options(self, promise: _Promise) -> dict[str, Any]:
        options: dict[str, Any] = {} if promise.ours else {"sites": self.sites}
        if promise.assertion is merges.assert_merges_add_up:
            options["may_lose"] = self.may_lose
        return options


def _sited(
    make: Callable[[], nn.Module], targets: str | list[str], sites: Sites
) -> SearchStrategy[Callable[[], nn.Module]]:
    """Return factories of the module with sites: its own, or drawn ones at `targets`."""
    generator = torch.random.get_rng_state()
    model = make()
    torch.random.set_rng_state(generator)
    if sites is not find_sites or has_sites(model):
        return st.just(make)
    return with_sites(make if isinstance(make, Call) else Call(make), targets)

"""The check of modules with low-rank weights."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from relora_core.low_rank.parametrization import LowRank
from relora_core.sites.site import low_rank_sites
from relora_core.sites.targets import add_low_rank_
from relora_core.testing.checks.runner import CI, Checks, Held
from relora_core.testing.expressions import Call, as_factory, code, written
from relora_core.testing.history import Event, lived
from relora_core.testing.inputs import Inputs, given_inputs, outputs
from relora_core.testing.properties import merges, redraws
from relora_core.testing.properties import roundtrips as lifetimes
from relora_core.testing.strategies.modules import histories, is_layer, with_sites
from relora_core.testing.subjects import LowRankSite, Sites, find_sites, has_sites


@dataclass(frozen=True)
class _Property:
    words: str
    assertion: Callable[..., None]
    inputs: bool = True  # whether the assertion takes the inputs of a call
    factory: bool = False  # whether it takes the factory
    new: bool = False  # whether it needs a new module, without a history
    ours: bool = False  # whether it applies to this library's sites only


_PROPERTIES = [
    _Property("it computes with W + s B A", merges.assert_is_dense),
    _Property("its gradients are those of W + s B A", merges.assert_gradients_are_dense),
    _Property("a merge keeps the function", merges.assert_merge_keeps_function),
    _Property(
        "a merge adds s B A to W, rounds once, and zeroes B",
        merges.assert_merge_adds_update,
        inputs=False,
    ),
    _Property("merging twice is merging once", merges.assert_merge_is_idempotent, inputs=False),
    _Property("a redraw depends on its key alone", redraws.assert_redraw_is_keyed, inputs=False),
    _Property("every factor learns in every cycle", redraws.assert_learns, new=True),
    _Property(
        "the rank grows with each restart, within its bound",
        redraws.assert_rank_grows,
        inputs=False,
    ),
    _Property("small merges are not lost", merges.assert_merges_add_up, inputs=False),
    _Property(
        "saving and loading commute with restarts",
        lifetimes.assert_saves_and_loads,
        factory=True,
    ),
    _Property("forward passes and copies change nothing", lifetimes.assert_copies_are_independent),
    _Property(
        "an export is the plain module's, merged",
        lifetimes.assert_export_is_merged,
        inputs=False,
        ours=True,
    ),
    _Property("register and remove cancel", lifetimes.assert_removal_cancels, ours=True),
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
    skip: Collection[str] = (),
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check all properties of a module with low-rank weights.

    The properties are:

    - The module and its gradients compute with W + s B A.
    - A merge keeps the function, rounds W once, changes nothing else, and can be repeated.
    - Small merges are not lost.
    - A redraw depends on its key alone.
    - Every factor learns, and the rank of the learned change grows (per matrix in a bank).
    - States save and load, copies are independent, and exports are plain weights.

    Learning is checked on a new module; all other properties are checked after random histories of
    steps, merges, redraws, forward passes, saves, loads, copies and moves.

    Args:
        make: factory of your module, or a strategy of factories (see `calls`). A module without
            sites gets sites at `targets`, with a drawn rank, scale and seed.
        targets: the same as in `add_low_rank_`.
        inputs: function of the module that returns the inputs of one call, a tensor or a tuple of
            tensors; None for random inputs that fit the first layer.
        sites: function that finds the sites of your own layers; see `LowRankSite`.
        may_lose: largest fraction of ten small merges that may be lost. A 16-bit W that is not
            split loses more than half; `math.inf` accepts that.
        skip: properties to leave out.
        profile: `CI`, `DEEP`, or your own hypothesis settings.

    Returns:
        The properties that held, each with its number of examples.

    Raises:
        PropertyError: if a property does not hold; the message contains the smallest failing case
            as runnable code. Later properties are not checked.
        TypeError: if `make` returns no module, or a module has only some of a site's attributes.
        ValueError: if `make` returns the same module twice, the model has no place for a site, or
            its inputs are not known.

    Examples:
        >>> few = hypothesis.settings(CI, max_examples=2)
        >>> held = check_low_rank(lambda: nn.Linear(3, 2), profile=few)
        >>> [one.property for one in held][:2]
        ['it computes with W + s B A', 'its gradients are those of W + s B A']
    """
    if isinstance(make, SearchStrategy):
        factories = make.flatmap(lambda one: _sited(one, targets, sites))
    else:
        with torch.random.fork_rng(devices=[]):
            _try(make, targets, inputs, sites)
        factories = _sited(make, targets, sites)
    subject = _Subject(inputs, sites, may_lose)
    checks = Checks(profile, [prop.words for prop in _PROPERTIES], skip)
    for prop in _PROPERTIES:
        events = st.just([]) if prop.new else histories()
        cases = st.builds(_Case, factories, events, st.integers(0, 3))
        check = functools.partial(subject.check, prop)
        checks.check(prop.words, cases, check, functools.partial(subject.show, prop))
    return checks.held


@dataclass(frozen=True)
class _Subject:
    inputs: Inputs | None
    sites: Sites
    may_lose: float

    def check(self, prop: _Property, case: _Case) -> bool:
        known: dict[str, Any] = {"inputs": self.inputs, "sites": self.sites}
        model = lived(case.make, case.events, seed=case.seed, **known)
        if prop.ours and not any(low_rank_sites(model)):
            return False
        factory = [case.make] if prop.factory else []
        x = given_inputs(model, self.inputs, seed=case.seed) if prop.inputs else ()
        prop.assertion(model, *factory, *x, **self._options(prop))
        return True

    def show(self, prop: _Property, case: _Case) -> str:
        """Return code that repeats `check`."""
        inputs = "" if self.inputs is None else written(self.inputs)
        sites = "" if self.sites is find_sites else f", sites={written(self.sites)}"
        known = (f", inputs={inputs}" if inputs else "") + sites
        events = f"{case.events!r}, seed={case.seed}"
        lines = [f"factory = {as_factory(case.make)}"]
        lines.append(f"model = testing.lived(factory, {events}{known})")
        arguments = ["model", "factory"] if prop.factory else ["model"]
        if prop.inputs:
            given = ", ".join(["model", *filter(None, [inputs]), f"seed={case.seed}"])
            lines.append(f"x = testing.given_inputs({given})")
            arguments.append("*x")
        options = {k: v for k, v in self._options(prop).items() if v is not find_sites}
        arguments += [f"{key}={written(value)}" for key, value in options.items()]
        lines.append(f"testing.{prop.assertion.__name__}({', '.join(arguments)})")
        return code(lines, case.make, self.inputs, self.sites)

    def _options(self, prop: _Property) -> dict[str, Any]:
        options: dict[str, Any] = {} if prop.ours else {"sites": self.sites}
        if prop.assertion is merges.assert_merges_add_up:
            options["may_lose"] = self.may_lose
        return options


def _sited(
    make: Callable[[], nn.Module], targets: str | list[str], sites: Sites
) -> SearchStrategy[Callable[[], nn.Module]]:
    """Return factories of the module with its own sites, or with drawn sites at `targets`."""
    with torch.random.fork_rng(devices=[]):
        model = make()
    _refuse_a_near_miss(model, sites)
    if sites is not find_sites or has_sites(model):
        return st.just(make)
    return with_sites(make if isinstance(make, Call) else Call(make), targets)


def _try(
    make: Callable[[], nn.Module], targets: str | list[str], inputs: Inputs | None, sites: Sites
) -> None:
    """Raise if an argument is invalid, before any property is checked."""
    if not callable(make) or isinstance(make, nn.Module):
        raise TypeError(
            "make must be a factory, a function of no arguments that returns a new module; got "
            f"{type(make).__name__}"
        )
    model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"make must return an nn.Module; got {type(model).__name__}")
    if make() is model:
        raise ValueError("make must return a new module at each call; got the same one twice")
    _refuse_a_near_miss(model, sites)
    if sites is find_sites and not has_sites(model) and not is_layer(model):
        add_low_rank_(model, targets, rank=1)
    with torch.no_grad():
        found = outputs(model.eval()(*given_inputs(model, inputs)))
    if not found:
        raise TypeError("the module must return floating-point tensors, or lists or dicts of them")


def _refuse_a_near_miss(model: nn.Module, sites: Sites) -> None:
    """Raise if a module has only some attributes of a site; its merge would not be checked."""
    marks = ("weight", "lora_A", "lora_B", "scale", "merge_", "redraw_")
    for name, module in model.named_modules():
        has = [mark for mark in marks if hasattr(module, mark)]
        own = isinstance(module, LowRankSite | LowRank)
        if sites is find_sites and {"lora_A", "lora_B"} & set(has) and not own:
            raise TypeError(
                f"{type(module).__name__} {name!r} must have all attributes of a low-rank site; it "
                f"has {', '.join(has)} but lacks "
                f"{', '.join(mark for mark in marks if mark not in has)}: add them, or pass sites= "
                "(see LowRankSite)"
            )

"""The check of an optimizer and of resets of its moments."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from relora_core.testing.checks.runner import CI, Checks, Held
from relora_core.testing.expressions import Call, as_factory, code, written
from relora_core.testing.properties import prunes, resets
from relora_core.testing.properties.resets import ResetFunction, reset_by_relora
from relora_core.testing.strategies.training import ratios, trained
from relora_core.testing.training import OptimizerFactory, Trained

_ANY_SIZE = "a ratio zeroes its share of more than 2**24 entries"
# Each property: its words, its assertion, and whether the assertion takes a ratio.
_PROPERTIES: list[tuple[str, Callable[..., None], bool]] = [
    (
        "a full reset leaves nothing by which a step could move",
        prunes.assert_full_reset_stands_still,
        False,
    ),
    (
        "a ratio zeroes its share, and keeps the bits of the rest",
        prunes.assert_prune_keeps_its_share,
        True,
    ),
    ("a reset leaves all else", resets.assert_reset_leaves_the_rest, True),
    ("the step after a reset is bounded", resets.assert_next_step_is_bounded, True),
    ("a reset before the first step does nothing", resets.assert_reset_before_the_first_step, True),
    ("a reset commutes with saving", resets.assert_reset_commutes_with_saving, True),
    ("moments that hold NaN are refused", resets.assert_nan_is_refused, True),
]


def check_resettable(
    make: OptimizerFactory | SearchStrategy[Call],
    *,
    reset: ResetFunction = reset_by_relora,
    prune_ratios: SearchStrategy[float] | None = None,
    sizes: SearchStrategy[tuple[tuple[int, ...], ...]] | None = None,
    by_magnitude: bool = True,
    keeps_counts: bool = True,
    skip: Collection[str] = (),
    profile: hypothesis.settings = CI,
) -> list[Held]:
    """Check all properties of an optimizer and of a reset of its moments.

    The properties are:

    - After a full reset, a step with zero gradients moves nothing.
    - A ratio zeroes its share of the entries and keeps the bits of the others, with or without
      ties, and also for more than 2**24 entries.
    - Other Parameters, groups and step counts stay the same.
    - The step after a reset is bounded.
    - A reset before the first step does nothing.
    - A reset commutes with saving.
    - A reset refuses NaN.

    Args:
        make: factory of your optimizer, a function of a list of Parameters, or a strategy of
            factories (see `calls`).
        reset: function of (optimizer, params, ratio); this library's by default.
        prune_ratios: strategy of prune ratios; `st.just(1.0)` if state can only be reset in full.
        sizes: strategy of the Parameters' shapes. If it is given, no Parameter of more than 2**24
            entries is checked.
        by_magnitude: whether the smallest entries must be zeroed; False for a reset that chooses
            entries by another rule.
        keeps_counts: whether step counts must stay; False for a reset that restarts them.
        skip: properties to leave out.
        profile: `CI`, `DEEP`, or your own hypothesis settings.

    Returns:
        The properties that held, each with its number of examples.

    Raises:
        PropertyError: if a property does not hold; the message contains the smallest failing case
            as runnable code. Later properties are not checked.

    Examples:
        >>> import torch
        >>> make = lambda params: torch.optim.AdamW(params, lr=0.01)
        >>> few = hypothesis.settings(CI, max_examples=2)
        >>> held = check_resettable(make, prune_ratios=ratios(), profile=few)
        >>> held[0].property
        'a full reset leaves nothing by which a step could move'
    """
    factories = make if isinstance(make, SearchStrategy) else st.just(make)
    share = ratios() if prune_ratios is None else prune_ratios
    rules: dict[Callable[..., None], dict[str, bool]] = {
        prunes.assert_prune_keeps_its_share: {"by_magnitude": by_magnitude},
        resets.assert_reset_leaves_the_rest: {"keeps_counts": keeps_counts},
    }
    checks = Checks(profile, [*(words for words, *_ in _PROPERTIES), _ANY_SIZE], skip)
    for words, assertion, takes_ratio in _PROPERTIES:
        fixed = {key: st.just(value) for key, value in rules.get(assertion, {}).items()}
        options = st.fixed_dictionaries({**({"ratio": share} if takes_ratio else {}), **fixed})
        cases = st.tuples(trained(factories, sizes), options)
        check = functools.partial(_check, assertion, reset)
        checks.check(words, cases, check, functools.partial(_show, assertion, reset))
    if sizes is None:
        once = hypothesis.settings(profile, max_examples=1)
        large = st.tuples(factories, share.filter(lambda ratio: ratio >= 0.5))
        check_large = functools.partial(_check_large, reset)
        checks = Checks(once, [_ANY_SIZE], [p for p in skip if p == _ANY_SIZE], checks.held)
        checks.check(_ANY_SIZE, large, check_large, functools.partial(_show_large, reset))
    return checks.held


def _check(
    assertion: Callable[..., None], reset: ResetFunction, drawn: tuple[Trained, dict[str, Any]]
) -> bool:
    case, options = drawn
    if assertion is resets.assert_nan_is_refused and not resets.can_hold_nan(case):
        return False
    assertion(case, **options, reset=reset)
    return True


def _show(
    assertion: Callable[..., None], reset: ResetFunction, drawn: tuple[Trained, dict[str, Any]]
) -> str:
    case, options = drawn
    given = ["case", *(f"{k}={v!r}" for k, v in options.items() if v is not True), *_given(reset)]
    call = f"testing.{assertion.__name__}({', '.join(given)})"
    return code([f"case = {case!r}", call], case.factory, reset)


def _check_large(reset: ResetFunction, drawn: tuple[OptimizerFactory, float]) -> bool:
    factory, ratio = drawn
    prunes.assert_any_size_is_pruned(factory, ratio=ratio, reset=reset)
    return True


def _show_large(reset: ResetFunction, drawn: tuple[Any, float]) -> str:
    factory, ratio = drawn
    given = ", ".join([as_factory(factory, "params"), f"ratio={ratio!r}", *_given(reset)])
    return code([f"testing.assert_any_size_is_pruned({given})"], factory, reset)


def _given(reset: ResetFunction) -> list[str]:
    return [] if reset is reset_by_relora else [f"reset={written(reset)}"]

"""Looks at one promise after another, down to the smallest case that breaks it."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy

from relora_core.testing.subjects import PropertyError

# Each is said, or hypothesis takes it from its own profile, another one where CI is set.
_COMMON: dict[str, Any] = {
    "print_blob": False,
    "deadline": None,
    "database": None,
    "report_multiple_bugs": False,
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
    "verbosity": hypothesis.Verbosity.quiet,
}
#: Seconds: the same examples every time.
CI = hypothesis.settings(max_examples=40, derandomize=True, stateful_step_count=15, **_COMMON)
#: Minutes: new examples every time.
DEEP = hypothesis.settings(max_examples=2100, derandomize=False, stateful_step_count=40, **_COMMON)

Case = TypeVar("Case")


@dataclass(frozen=True)
class Held:
    """A promise that held.

    Args:
        promise: in words.
        examples: on how many it was looked at.
    """

    promise: str
    examples: int


@dataclass
class Battery:
    """Promises that are looked at in turn.

    Args:
        profile: how many examples, and which.
        promises: all that there are, in words.
        skip: those that are passed over.
        held: those that have held so far.

    Raises:
        ValueError: if one that is to be passed over is none of them.
    """

    profile: hypothesis.settings
    promises: Iterable[str]
    skip: Collection[str] = ()
    held: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = list(self.promises)
        unknown = [promise for promise in self.skip if promise not in known]
        if isinstance(self.skip, str) or unknown:
            raise ValueError(f"skip is a list of promises, of {known}; got {self.skip!r}")

    def look(
        self,
        promise: str,
        cases: SearchStrategy[Case],
        check: Callable[[Case], bool],
        show: Callable[[Case], str],
    ) -> None:
        """Look at one promise.

        Args:
            promise: in words.
            cases: what to look at it on.
            check: raises if it does not hold on a case; returns whether it applies to it.
            show: returns the code that repeats that.

        Raises:
            PropertyError: if it does not hold, of the smallest case that was found.
        """
        if promise in self.skip:
            return
        latest: list[Case] = []
        count = 0

        @self.profile
        @hypothesis.given(cases)
        def promised(case: Case) -> None:
            nonlocal count
            latest[:] = [case]
            with torch.random.fork_rng(devices=[]):
                count += check(case)

        with self.telling(promise, lambda error: show(latest[-1]) if latest else ""):
            promised()
        if count:
            self.held.append(Held(promise, count))

    def telling(self, promise: str, show: Callable[[Exception], str]) -> "_Telling":
        """Return a context that adds the promise and its smallest case to an error raised in it."""
        return _Telling(promise, show, self.held)


@dataclass
class _Telling:
    promise: str
    show: Callable[[Exception], str]
    held: list[Held]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception):
            return
        own = isinstance(error, PropertyError)
        said = str(error) if own else f"{type(error).__name__}: {error}"
        shown = "\n".join(f"    {line}".rstrip() for line in self.show(error).splitlines())
        before = "".join(f"\n  held: {one.promise} ({one.examples} examples)" for one in self.held)
        raise PropertyError(
            f"broken: {self.promise}\n  {said}\n\nThe smallest case that was found, as code:\n\n"
            f"{shown}\n{before}"
        ) from error

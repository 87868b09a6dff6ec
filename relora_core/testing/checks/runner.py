"""Properties checked in turn, each down to the smallest case that breaks it."""

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
    """A property that held.

    Args:
        property: in words.
        examples: number of examples that it was checked on.
    """

    property: str
    examples: int


@dataclass
class Checks:
    """Properties that are checked in turn.

    Args:
        profile: how many examples, and which.
        properties: all that there are, in words.
        skip: those to leave out.
        held: those that have held so far.

    Raises:
        ValueError: if one that is to be passed over is none of them.
    """

    profile: hypothesis.settings
    properties: Iterable[str]
    skip: Collection[str] = ()
    held: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = list(self.properties)
        unknown = [prop for prop in self.skip if prop not in known]
        if isinstance(self.skip, str) or unknown:
            raise ValueError(f"skip is a list of properties, of {known}; got {self.skip!r}")

    def check(
        self,
        prop: str,
        cases: SearchStrategy[Case],
        holds: Callable[[Case], bool],
        show: Callable[[Case], str],
    ) -> None:
        """Check one property.

        Args:
            prop: in words.
            cases: the examples.
            holds: raises if the property does not hold on a case; returns whether it applies.
            show: returns the code that repeats that.

        Raises:
            PropertyError: if it does not hold, of the smallest case that was found.
        """
        if prop in self.skip:
            return
        latest: list[Case] = []
        count = 0

        @self.profile
        @hypothesis.given(cases)
        def checked(case: Case) -> None:
            nonlocal count
            latest[:] = [case]
            with torch.random.fork_rng(devices=[]):
                count += holds(case)

        with self.telling(prop, lambda error: show(latest[-1]) if latest else ""):
            checked()
        if count:
            self.held.append(Held(prop, count))

    def telling(self, prop: str, show: Callable[[Exception], str]) -> "_Telling":
        """Return a context that adds property and smallest case to an error raised in it."""
        return _Telling(prop, show, self.held)


@dataclass
class _Telling:
    prop: str
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
        before = "".join(f"\n  held: {one.property} ({one.examples} examples)" for one in self.held)
        raise PropertyError(
            f"broken: {self.prop}\n  {said}\n\nThe smallest case that was found, as code:\n\n"
            f"{shown}\n{before}"
        ) from error

"""The runner of checks, which shrinks each failure to the smallest failing case."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy

from relora_core.testing.subjects import PropertyError

# All are set here: hypothesis' own profile would supply the others, and it differs in CI.
_COMMON: dict[str, Any] = {
    "print_blob": False,
    "deadline": None,
    "database": None,
    "report_multiple_bugs": False,
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
    "verbosity": hypothesis.Verbosity.quiet,
}
#: Profile that takes seconds; the examples are the same in every run.
CI = hypothesis.settings(max_examples=40, derandomize=True, stateful_step_count=15, **_COMMON)
#: Profile that takes minutes; the examples are new in every run.
DEEP = hypothesis.settings(max_examples=2100, derandomize=False, stateful_step_count=40, **_COMMON)

Case = TypeVar("Case")


@dataclass(frozen=True)
class Held:
    """A property that held.

    Args:
        property: the property in words.
        examples: number of examples it was checked on.
    """

    property: str
    examples: int


@dataclass
class Checks:
    """A runner of properties, one after the other.

    Args:
        profile: hypothesis settings, which choose the examples.
        properties: all properties, in words.
        skip: properties to leave out.
        held: properties that have held so far.

    Raises:
        ValueError: if `skip` is a string or contains an unknown property.
    """

    profile: hypothesis.settings
    properties: Iterable[str]
    skip: Collection[str] = ()
    held: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = list(self.properties)
        unknown = [prop for prop in self.skip if prop not in known]
        if isinstance(self.skip, str) or unknown:
            raise ValueError(f"skip must be a list of properties from {known}; got {self.skip!r}")

    def check(
        self,
        prop: str,
        cases: SearchStrategy[Case],
        holds: Callable[[Case], bool],
        show: Callable[[Case], str],
    ) -> None:
        """Check one property.

        Args:
            prop: the property in words.
            cases: strategy of the cases.
            holds: function that raises if the property does not hold on a case, and returns whether
                it applies to the case.
            show: function that returns code that repeats the check of a case.

        Raises:
            PropertyError: if the property does not hold, with the smallest failing case.
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
        """Return a context that adds the property and the smallest case to any error."""
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
            f"broken: {self.prop}\n  {said}\n\nThe smallest failing case, as code:\n\n"
            f"{shown}\n{before}"
        ) from error

"""Fields of the configuration: a default, a help text and bounds, declared together."""

import dataclasses
from operator import ge, gt, le, lt
from typing import Any

from reference_trainer.errors import UserError

_HOLDS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}
STRICT = {"extra": "forbid", "allow_inf_nan": False}  # for pydantic, which validates files


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field of a number, a text or several; its bounds hold for each number.

    Args:
        default: the value if none is given.
        help: the text that --help shows.
        at_least: lower bound, included.
        above: lower bound, excluded.
        at_most: upper bound, included.
        below: upper bound, excluded.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    known = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, "bounds": known})


def section(cls: type, help: str) -> Any:
    """Return a dataclass field that holds another dataclass of options."""
    return dataclasses.field(default_factory=cls, metadata={"help": help})


def require(holds: bool, rule: str, **values: object) -> None:
    """Raise UserError with the rule and the values unless it holds."""
    if not holds:
        shown = (str(v) if k == "got" else f"{k}={v}" for k, v in values.items())
        raise UserError(f"{rule}; got {', '.join(shown)}")


def require_bounds(options: Any, prefix: str) -> None:
    """Check every option of a dataclass against its bounds.

    Args:
        options: the dataclass.
        prefix: the dotted prefix of its options' names: "optim.".

    Raises:
        UserError: if a value is outside its bounds.
    """
    for field in dataclasses.fields(options):
        bounds, value = field.metadata.get("bounds"), getattr(options, field.name)
        if not bounds or value is None:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        holds = all(_HOLDS[name](n, bound) for n in numbers for name, bound in bounds.items())
        require(holds, f"{prefix}{field.name} must be {in_words(**bounds)}", got=value)


def in_words(
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> str:
    """Return bounds in words, to follow "must be".

    Examples:
        >>> in_words(at_least=1), in_words(above=0), in_words(at_least=0, at_most=1)
        ('1 or more', 'positive', 'from 0 to 1')
        >>> in_words(above=0, below=1), in_words(above=0, at_most=1440)
        ('between 0 and 1, both excluded', 'above 0 and at most 1440')
    """
    match (at_least, above, at_most, below):
        case (low, None, None, None):
            return f"{low} or more"
        case (None, 0, None, None):
            return "positive"
        case (low, None, high, None) if low is not None:
            return f"from {low} to {high}"
        case (None, low, None, high) if high is not None:
            return f"between {low} and {high}, both excluded"
    lower = f"at least {at_least}" if above is None else f"above {above}"
    upper = f"at most {at_most}" if below is None else f"below {below}"
    return f"{lower} and {upper}"

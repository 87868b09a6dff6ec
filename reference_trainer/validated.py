"""Values out of files and arguments, checked against the type that they should have."""

from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class MismatchError(ValueError):
    """A value is not of the type that it should have.

    Args:
        message: all that is wrong.
        first: pydantic's account of the first of it.
    """

    def __init__(self, message: str, first: Any) -> None:
        super().__init__(message)
        self.first = first


def validated(kind: type[T], value: Any) -> T:
    """Return `value` as a `kind`, a dataclass say.

    Raises:
        MismatchError: if it is none.

    Examples:
        >>> validated(tuple[int, ...], [1, 2])
        (1, 2)
    """
    # Imported here, so that only who reads such values needs it.
    from pydantic import ValidationError

    hashable: Any = kind
    try:
        found: T = _adapter(hashable).validate_python(value)
    except ValidationError as error:
        raise MismatchError(str(error), error.errors()[0]) from None
    return found


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)

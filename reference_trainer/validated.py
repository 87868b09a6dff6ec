"""Values out of files and arguments, checked against the type that they should have."""

from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class MismatchError(ValueError):
    """A value is not of the type that it should have.

    It is written out when it is asked for: a file may hold what is huge.

    Args:
        error: pydantic's.
    """

    def __init__(self, error: Any) -> None:
        super().__init__()
        self.error = error

    @property
    def first(self) -> Any:
        """Pydantic's account of the first thing that is wrong."""
        return self.error.errors()[0]

    def __str__(self) -> str:
        return str(self.error)


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
        raise MismatchError(error) from None
    return found


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)

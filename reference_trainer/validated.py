"""Values out of files and arguments, checked against the type that they should have."""

from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class MismatchError(ValueError):
    """A value is not of the type that it should have.

    The message is made only when it is asked for, because a file may hold huge values.

    Args:
        error: pydantic's error.
    """

    def __init__(self, error: Any) -> None:
        super().__init__()
        self.error = error

    @property
    def first(self) -> Any:
        """Pydantic's description of the first thing that is wrong."""
        return self.error.errors()[0]

    def __str__(self) -> str:
        return str(self.error)


def validated(kind: type[T], value: Any) -> T:
    """Return `value` as a `kind`, such as a dataclass.

    Raises:
        MismatchError: if `value` does not fit `kind`.

    Examples:
        >>> validated(tuple[int, ...], [1, 2])
        (1, 2)
    """
    # Imported here, so that only code that reads such values needs pydantic.
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

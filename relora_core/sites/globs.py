"""Globs over qualified names, each of which must match something."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase


def matching(
    globs: str | Iterable[str],
    names: Iterable[str],
    what: str,
    *,
    option: str = "targets",
    matches: Callable[[str, str], bool] = fnmatchcase,
) -> list[str]:
    """Return those of `names` that a glob matches, in their order.

    Args:
        globs: one glob or several.
        names: the names to choose from.
        what: the kind of thing that is named, for the error message.
        option: the option that holds the globs, for the error message.
        matches: a function of a name and a glob that says whether they match.

    Raises:
        ValueError: if there is no glob, or a glob matches no name.
        TypeError: if a glob is not a string.
    """
    globs, names = as_list(globs, option), list(names)
    if not globs:
        raise ValueError(f"{option} is empty: name at least one glob, such as '*.mlp.*'")
    for glob in globs:
        if not any(matches(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{option}: {glob!r} matches no {what}; there are: {shown or 'none'}")
    return [name for name in names if any(matches(name, glob) for glob in globs)]


def as_list(globs: str | Iterable[str], option: str) -> list[str]:
    """Return one or several globs as a list.

    Raises:
        TypeError: if a glob is not a string.
    """
    several = [globs] if isinstance(globs, str) or not isinstance(globs, Iterable) else list(globs)
    for glob in several:
        if not isinstance(glob, str):
            raise TypeError(f"{option} must be a glob or several, such as '*.mlp.*'; got {globs!r}")
    return several

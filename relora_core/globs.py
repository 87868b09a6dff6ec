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
        globs: one or several.
        names: to choose from.
        what: each of them is, for the error.
        option: that holds the globs, for the error.
        matches: of a name and a glob, whether they do.

    Raises:
        ValueError: if there is no glob, or one that matches none.
    """
    globs, names = [globs] if isinstance(globs, str) else list(globs), list(names)
    if not globs:
        raise ValueError(f"{option} is empty: name at least one glob, such as '*.mlp.*'")
    for glob in globs:
        if not any(matches(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{option}: {glob!r} matches no {what}; there are: {shown or 'none'}")
    return [name for name in names if any(matches(name, glob) for glob in globs)]

"""The nearest known name to one that was mistyped."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint with the one of `names` that is closest to `name`; empty if none is close.

    Examples:
        >>> nearest("--rnak", ["--relora.rank", "--runs"])
        ': the nearest is --relora.rank'
        >>> nearest("--colour", ["--relora.rank", "--runs"])
        ''
    """
    leaf = {known: known.rpartition(".")[2].removeprefix("--") for known in names}
    asked = name.rpartition(".")[2].removeprefix("--")
    score = {
        known: max(
            difflib.SequenceMatcher(None, name, known).ratio(),
            difflib.SequenceMatcher(None, asked, last).ratio(),
        )
        for known, last in leaf.items()
    }
    best = max(score, key=score.__getitem__)
    return f": the nearest is {best}" if score[best] > 0.6 else ""

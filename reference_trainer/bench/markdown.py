"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table with one line for the header and one for each row.

    Examples:
        >>> print(table(["arm", "time"], [["full rank", "1.00"]]))
        | arm | time |
        | --- | --- |
        | full rank | 1.00 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""The records of a study: JSON lines, a trial each."""

import json
from pathlib import Path
from typing import Any

from reference_trainer.errors import UserError, one_line

_BEGINNING = '{"event": "trial"'  # of every line


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none if it is absent. One that was cut short is left out.

    Raises:
        UserError: if it holds anything else.
    """
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
        records = [json.loads(line) for line in whole(text).splitlines()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from None
    if any(not isinstance(r, dict) or r.get("event") != "trial" for r in records):
        raise UserError(f"{file} must hold trials only: give --out another name")
    return records


def whole(text: str) -> str:
    """Return lines that another can follow: without a last one that is part of a trial."""
    before, end, last = text.rpartition("\n")
    cut = _BEGINNING.startswith(last[: len(_BEGINNING)]) and not last.endswith("}")
    return before + end if cut else f"{text}\n"

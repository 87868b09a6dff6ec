"""The records of a study: a JSON Lines file with one trial per line."""

import json
from pathlib import Path
from typing import Any

from reference_trainer.errors import UserError, one_line

_BEGINNING = '{"event": "trial"'  # the beginning of every line


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file, without a truncated last line; none if the file is absent.

    Raises:
        UserError: if the file cannot be read or holds anything but trials.
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
    """Return the text ready for another line: without a truncated last trial."""
    before, end, last = text.rpartition("\n")
    cut = _BEGINNING.startswith(last[: len(_BEGINNING)]) and not last.endswith("}")
    return before + end if cut else f"{text}\n"

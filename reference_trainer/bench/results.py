"""The records of a measurement: JSON Lines files with every repeat, and tables of ratios."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_trainer.bench import markdown
from reference_trainer.errors import UserError, one_line

FEWEST = 7  # repeats that a ratio needs


@dataclass(frozen=True)
class Spread:
    """The quartiles of repeats.

    Args:
        low: first quartile.
        median: median.
        high: third quartile.
    """

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the quartiles of `values`; a single value is all three quartiles.

    Examples:
        >>> spread([1, 2, 3, 4, 5])
        Spread(low=2.0, median=3.0, high=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(values: Sequence[float], baseline: Sequence[float]) -> Spread | None:
    """Return the quartiles of value / baseline in each round, or None if there are too few rounds.

    Examples:
        >>> ratio([1.0] * 7, [2.0] * 7)
        Spread(low=0.5, median=0.5, high=0.5)
        >>> ratio([1.0] * 6, [2.0] * 6) is None
        True
    """
    if len(values) < FEWEST:
        return None
    return spread([value / base for value, base in zip(values, baseline, strict=True)])


def write(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Write one JSON object per line."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file that `write` wrote.

    Raises:
        UserError: if the file cannot be read or is not such a file.
    """
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from None
    sound = records and all(isinstance(record, dict) for record in records)
    if not sound or records[0].get("event") != "bench":
        raise UserError(f"{file} must hold a measurement of `bench`; it does not")
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown tables of a measurement, after a line that describes its environment."""
    blocks = [_where(records[0])]
    for kind, rows_of in (("traffic", _traffic), ("peak", _peaks)):
        found = [record for record in records if record["event"] == kind]
        if found:
            return "\n\n".join([*blocks, _markdown(rows_of(found))])
    for subject, arms in by_subject(records):
        rows = [_row(arm, arms[0]) for arm in arms]
        title = f"**{subject}**, ratios to {arms[0]['arm']}"
        blocks.append(title + "\n\n" + _markdown(rows))
    if not enough(records):
        blocks.append(f"Ratios of times need at least {FEWEST} repeats.")
    return "\n\n".join(blocks)


def enough(records: Sequence[dict[str, Any]]) -> bool:
    """Whether every arm was repeated often enough for a ratio."""
    arms = [record for record in records if record["event"] == "arm"]
    return bool(arms) and all(len(arm.get("step_seconds", ())) >= FEWEST for arm in arms)


def by_subject(
    records: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Iterate over pairs (subject, its arms); the first arm is the baseline."""
    arms = [record for record in records if record["event"] == "arm"]
    for subject in dict.fromkeys(record["subject"] for record in arms):
        yield subject, [record for record in arms if record["subject"] == subject]


def total(sent: Sequence[dict[str, Any]], collective: str | None = None) -> int:
    """Return the bytes that a process sent in all collectives, or in one kind of them."""
    return sum(s["bytes"] for s in sent if collective in (None, s["collective"]))


def _traffic(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    kinds = list(dict.fromkeys(s["collective"] for record in records for s in record["step"]))
    rows = []
    for record in records:
        step, restart = record["step"], record.get("restart")
        row = {f"each of {record['processes']:,} processes sends": record["arm"]}
        row |= {f"{kind}, MB": f"{total(step, kind) / 1e6:,.0f}" for kind in kinds}
        row["a step, MB"] = f"{total(step) / 1e6:,.0f}"
        row["ratio"] = f"{total(step) / total(records[0]['step']):.3f}"
        row["a restart, MB"] = "" if restart is None else f"{total(restart) / 1e6:,.0f}"
        share = 0 if restart is None else total(restart) / record["gather_of_W"]
        row["of a gather of W"] = "" if restart is None else f"{share:.1%}"
        rows.append(row)
    return rows


def _peaks(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    by_arm: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], {})[record["recompute"]] = record
    base = by_arm[records[0]["arm"]]
    rows = []
    for arm, modes in by_arm.items():
        kept = modes["none"]
        row = {f"GiB on each of {kept['processes']}": arm}
        for part in ("weights", "optimizer"):
            row[part] = f"{kept[part] / 2**30:.2f}"
        for mode, found in modes.items():
            title = "peak" if mode == "none" else f"peak, {mode}"
            peak, full = found["total"], base[mode]["total"]
            row[title] = f"{peak / 2**30:.2f} ({peak / full:.2f})"
            if "measured" in found:
                row[f"measured / {title}"] = f"{found['measured'] / peak:.3f}"
        for mode, found in modes.items():
            if "flops" in found and mode != "none":
                again = found["flops"] / kept["flops"] - 1
                row[f"computed again, {mode}"] = f"{again:.1%}"
        rows.append(row)
    return rows


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    return markdown.table(list(rows[0]), (row.values() for row in rows))


def _where(first: dict[str, Any]) -> str:
    known = [f"{first['device']}, {first['threads']} threads", f"torch {first['torch']}"]
    known += [
        f"{key} {first[key]}"
        for key in ("model", "layers", "vocab", "dtype", "tokens", "length", "rank", "seed")
        if key in first
    ]
    mode = first.get("checkpoint_activations")
    known += [f"activation checkpointing {mode}"] if mode in ("selective", "full") else []
    known += ["layout replicate"] if first.get("layout") == "replicate" else []
    return ", ".join([*known, str(first["date"])[:10]])


def _row(arm: dict[str, Any], base: dict[str, Any]) -> dict[str, str]:
    row = {"arm": str(arm["arm"])}
    for part, title in (("backward", "forward + backward"), ("step", "whole step")):
        if f"{part}_seconds" not in arm:
            continue
        values, baseline = arm[f"{part}_seconds"], base[f"{part}_seconds"]
        if part == "step" and "backward_seconds" not in arm:
            title = "time"
        row[title] = f"{spread(values).median * 1e3:,.0f} ms"
        row[f"{title}, ratio (quartiles)"] = _quartiles(ratio(values, baseline))
    for key, title, unit in (
        ("flops", "TFLOP", 1e12),
        ("kept_bytes", "kept for backward, MB", 1e6),
        ("peak_bytes", "peak, MB", 1e6),
    ):
        if key in arm:
            share = arm[key] / base[key]
            row[title] = f"{arm[key] / unit:,.{3 if key == 'flops' else 0}f} ({share:.3f})"
    return row


def _quartiles(ratio: Spread | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"

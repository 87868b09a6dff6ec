"""The Markdown tables of a suite: measured figures and the roofline, by stage."""

from collections.abc import Sequence
from typing import Any

from reference_trainer.bench import markdown
from reference_trainer.bench.suite.jobs import EXPECTED, JOBS, Job

_UNITS = {"bytes": (2**30, "GiB"), "bytes/s": (1e12, "TB/s"), "FLOP/s": (1e12, "TFLOP/s")}
_OFF = 0.15  # largest accepted relative difference from the roofline


def table(records: Sequence[dict[str, Any]], jobs: Sequence[Job] = JOBS) -> str:
    """Return the tables of a suite: the environment, how each job ended, and all figures.

    Args:
        records: records of the suite.
        jobs: jobs of the suite.
    """
    blocks = [_where(records), _ends(records, jobs)]
    dry = not all(record["cuda"] for record in records if record["event"] == "suite")
    latest, expected = _both(records)
    for job in dict.fromkeys((job.stage, job.title) for job in jobs):
        names = {one.name for one in jobs if one.stage == job[0]}
        own = [r for r in latest.values() if r["job"] in names]
        if own:
            blocks.append(f"**{job[0]}. {job[1]}**\n\n{_figures(own, latest, expected, dry=dry)}")
        blocks += [_profile(r) for r in _last(records, "profile") if r["job"] in names]
        blocks += [
            f"Kernels of {r['what']}: {', '.join(r['names'])}"
            for r in _last(records, "kernels")
            if r["job"] in names
        ]
    return "\n\n".join(blocks)


def off(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the figures that differ from the roofline by more than 15 percent."""
    latest, expected = _both(records)
    known = {what: latest[what]["value"] / expected[what] for what in expected if what in latest}
    return [f"{what}: {share:.2f}" for what, share in known.items() if abs(share - 1) > _OFF]


def _both(
    records: Sequence[dict[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the latest record and the expected value of each figure."""
    latest = {r["what"]: r for r in records if r["event"] == "measured"}
    expected = {r["what"]: r["value"] for r in records if r["event"] == "expected"}
    return latest, expected | {what: r["expected"] for what, r in latest.items() if "expected" in r}


def _where(records: Sequence[dict[str, Any]]) -> str:
    first = next((r for r in records if r["event"] == "suite"), None)
    if first is None:
        return "No suite has begun."
    dry = "" if first["cuda"] else " (dry: small shapes on a CPU; its figures mean nothing)"
    beside = f"ceilings of {first['gpu']}" if first["gpu"] else "no ceilings known"
    known = f"{first['device']}, torch {first['torch']}, Python {first['python']}"
    return f"{known}, {beside}, seed 0, {str(first['date'])[:10]}{dry}"


def _ends(records: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> str:
    ends = {record["job"]: record for record in records if record["event"] == "end"}
    begun = {record["job"] for record in records if record["event"] == "begin"}
    rows = []
    for job in (*jobs, EXPECTED):
        end = ends.get(job.name)
        if end is None:
            status, seconds = ("cut off" if job.name in begun else "not run"), ""
        else:
            told = f": {end['error']}" if end["error"] else ""
            status, seconds = f"{end['status']}{told}", f"{end['seconds']:.0f} s"
        rows.append([str(job.stage or ""), job.title, job.name, status, seconds])
    return markdown.table(["stage", "of", "job", "ended", "after"], rows)


def _figures(
    own: Sequence[dict[str, Any]],
    latest: dict[str, Any],
    expected: dict[str, float],
    *,
    dry: bool,
) -> str:
    rows = []
    for record in own:
        what, value, unit = record["what"], record["value"], record["unit"]
        base = record.get("baseline")
        row = [what, _shown(value, unit), "", "", "", ""]
        if what in expected:
            row[2] = _shown(expected[what], unit)
            row[3] = "" if dry else f"{value / expected[what]:.2f}"
        if base in latest:
            row[4] = f"{value / latest[base]['value']:.3f}"
        if base in expected and what in expected:
            row[5] = f"{expected[what] / expected[base]:.3f}"
        rows.append(row)
    header = ["", "measured", "roofline", "of it", "to full rank", "roofline's"]
    return markdown.table(header, rows)


def _profile(record: dict[str, Any]) -> str:
    copies = ", ".join(f"{count} x {name}" for name, count in record["copies"].items()) or "none"
    rows = [
        [name.replace("|", "/"), str(count), _shown(seconds, "s")]
        for name, (count, seconds) in record["kernels"].items()
    ]
    waits = sum(record["waits"].values())
    told = f"{record['what']}: {record['launches']:,} launches, {waits} waits of the host, copies: "
    return f"{told}{copies}\n\n{markdown.table(['kernel', 'times', 'time'], rows)}"


def _last(records: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return list({r["what"]: r for r in records if r["event"] == event}.values())


def _shown(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:,.3g} ms" if value < 1 else f"{value:,.3g} s"
    scale, name = _UNITS.get(unit, (1, unit))
    shown = f"{value:,}" if isinstance(value, int) and scale == 1 else f"{value / scale:,.3f}"
    return f"{shown} {name}"

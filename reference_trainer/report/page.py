"""One self-contained page of one or more runs: tables, curves, options and environment."""

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from reference_trainer.logging.records import Ranks, Restart
from reference_trainer.report import panels
from reference_trainer.report.recorded import Recorded, effective_ranks, ranks

Row = tuple[str, list[str]]
_PANELS = (
    panels.draw_loss,
    panels.draw_rate,
    panels.draw_rank,
    panels.draw_spectrum,
    panels.draw_speed,
    panels.draw_memory,
)
_OF_CYCLES = (panels.draw_rank, panels.draw_spectrum)


def page(runs: Sequence[Recorded], *, made: str, refresh: int | None = None) -> str:
    """Return the page as HTML.

    Args:
        runs: one run or more; several are compared in what differs.
        made: a line that says when the page was made, and from what.
        refresh: the number of seconds after which a browser reloads the page; None for never.
    """
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        (files("reference_trainer") / "report/page.html").read_text(encoding="utf-8")
    )
    names = [run.name for run in runs]
    options = _options(runs)
    return template.render(
        title=", ".join(names),
        names=names,
        made=made,
        refresh=refresh,
        summary=_rows(runs, _SUMMARY),
        figure=Markup(_figure(runs)),
        legend="black: end of the warm start; dotted: restarts" if len(runs) == 1 else "",
        restarts=[(run.name, *_restarts(run)) for run in runs if run.restarts],
        options=options,
        different=[row for row in options if len(set(row[1]) - {"-"}) > 1],
        environment=_rows(runs, _ENVIRONMENT),
    )


def _figure(runs: Sequence[Recorded]) -> str:
    runs = [replace(run, name=run.name.replace("$", r"\$")) for run in runs]  # no formula
    # Text stays text, and the same runs give the same page.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "relora"}):
        figure = Figure(figsize=(12, 11), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, panel in zip(figure.subplots(3, 2).flatten(), _PANELS, strict=True):
            panel(axes, runs)
            if len(runs) == 1 and panel not in _OF_CYCLES:
                panels.mark_phases(axes, runs[0])
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def _progress(run: Recorded) -> str:
    done, steps = run.steps
    if steps is None:
        return f"{done:,} steps"
    return f"{done:,} of {steps:,} steps" + ("" if done >= steps else ", not at its end")


def _tokens(run: Recorded) -> str:
    known = run.options
    if not known:
        return "-"
    return f"{run.steps[0] * known['batch.sequences'] * known['batch.length']:,}"


def _held_out(run: Recorded, *, where: str) -> str:
    points = run.evaluations
    if where == "handed over":
        points = [r for r in points if r["phase"] == "warm-start" and run.handed_over is not None]
    if not points:
        return "-"
    return f"{points[0 if where == 'first' else -1]['held_out_loss']:.4f}"


def _rank(run: Recorded, measure: Callable[[Ranks], Mapping[str, float]]) -> str:
    found = measure(run.ranks[-1][1]).values() if run.ranks else ()
    if not found:
        return "not measured"
    cycles, record = run.ranks[-1]
    bound = f", bound {record['bound']}" if measure is ranks else ""
    return f"{min(found):g} to {max(found):g} after {cycles} cycles{bound}"


def _speed(run: Recorded, phase: str) -> str:
    values = [r["tokens_per_second"] for r in run.trained if r["phase"] == phase]
    return f"{statistics.median(values):,.0f}" if values else "-"


def _memory(run: Recorded) -> str:
    values = [r["peak_memory"] for r in run.trained if r.get("peak_memory") is not None]
    return f"{max(values) / 2**30:.2f} GiB" if values else "-"


_SUMMARY = {
    "progress": _progress,
    "tokens": _tokens,
    "held-out loss at first": lambda run: _held_out(run, where="first"),
    "after the warm start": lambda run: _held_out(run, where="handed over"),
    "at last": lambda run: _held_out(run, where="last"),
    "restarts": lambda run: str(len(run.restarts)),
    "rank of the update": lambda run: _rank(run, ranks),
    "its effective rank": lambda run: _rank(run, effective_ranks),
    "tokens a second, warm start": lambda run: _speed(run, "warm-start"),
    "tokens a second, ReLoRA": lambda run: _speed(run, "relora"),
    "peak memory of a process": _memory,
    "steps skipped": lambda run: str(len(run.skipped)),
    "jumps of the loss": lambda run: str(len(run.spikes)),
}
_ENVIRONMENT = {
    name: lambda run, name=name: str(run.start.get(name, "-"))
    for name in ("device", "processes", "threads", "cores", "torch", "python", "seed", "date")
}


def _rows(runs: Sequence[Recorded], cells: dict[str, Any]) -> list[Row]:
    return [(name, [cell(run) for run in runs]) for name, cell in cells.items()]


def _options(runs: Sequence[Recorded]) -> list[Row]:
    names = dict.fromkeys(name for run in runs for name in run.options)
    return [
        (name, [_shown(run.options[name]) if run.options else "-" for run in runs])
        for name in names
    ]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _restarts(run: Recorded) -> tuple[list[str], list[Row]]:
    head = ["", "before step", "mean norm of s·BA", "moments zeroed", "seconds", "rank"]
    return head, [(str(record["restart"]), _restart(record)) for record in run.restarts]


def _restart(record: Restart) -> list[str]:
    found = record["ranks"].values()
    return [
        f"{record['step']:,}",
        f"{record['mean_update_norm']:.3g}",
        f"{record['zeroed_fraction']:.2%}",
        f"{record['seconds']:.3f}",
        f"{min(found)} to {max(found)}" if found else "-",
    ]

"""The panels of a report, each on axes of its own: one run in detail, or several by colour."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from reference_trainer.report.recorded import Recorded, effective_ranks, ranks

_TRAIN, _HELD_OUT, _RESTART, _BOUND = "#9ecae1", "#08519c", "#d94801", "#969696"
_Record = Mapping[str, Any]  # any event's
_MOST_NAMED = 10  # matrices; if there are more, matrices of one kind share a legend entry


def draw_loss(axes: Axes, runs: Sequence[Recorded]) -> None:
    """Draw the training loss and the held-out one."""
    alone = len(runs) == 1
    for number, run in enumerate(runs):
        train, held_out = (_TRAIN, _HELD_OUT) if alone else (f"C{number}", f"C{number}")
        label, alpha = ("training", 1.0) if alone else ("_", 0.3)
        _plot(axes, run.trained, "loss", train, label, alpha)
        points = run.evaluations
        axes.plot(
            [record["step"] for record in points],
            [record["held_out_loss"] for record in points],
            color=held_out,
            marker="o",
            markersize=4,
            label="held out" if alone else run.name,
        )
    _finish(axes, "loss, nats a token", "optimizer step")


def draw_rate(axes: Axes, runs: Sequence[Recorded]) -> None:
    """Draw the learning rates of the adapters and, for a single run, of the other matrices."""
    for number, run in enumerate(runs):
        if len(runs) == 1:
            _plot(axes, run.rates, "lr_adapters", _RESTART, "adapters")
            _plot(axes, run.rates, "lr_matrices", _HELD_OUT, "other matrices")
        else:
            before = [r for r in run.rates if "lr_adapters" not in r]
            _plot(axes, before, "lr_matrices", f"C{number}", "_")
            _plot(axes, run.rates, "lr_adapters", f"C{number}", run.name)
    _finish(axes, "learning rate", "optimizer step")


def draw_rank(axes: Axes, runs: Sequence[Recorded]) -> None:
    """Draw rank and effective rank by cycle: of each matrix of one run, or medians of several."""
    if not any(run.ranks for run in runs):
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=_BOUND)
    elif len(runs) == 1:
        _draw_each_rank(axes, runs[0])
    for number, run in enumerate(runs if len(runs) > 1 else []):
        for measure, style, label in ((ranks, "-o", run.name), (effective_ranks, ":", "_")):
            points = [(cycle, found) for cycle, r in run.ranks if (found := measure(r).values())]
            axes.plot(
                [cycle for cycle, _ in points],
                [statistics.median(found) for _, found in points],
                style,
                color=f"C{number}",
                markersize=4,
                label=label,
            )
    title = "rank of the accumulated update (dotted: effective rank)"
    _finish(axes, title if len(runs) == 1 else f"{title}, median", "cycles merged")
    axes.set_ylim(bottom=0)


def draw_spectrum(axes: Axes, runs: Sequence[Recorded]) -> None:
    """Draw the singular values of the update at the end, of every matrix that was followed."""
    found = [(run, end["spectra"]) for run in runs for end in run.ends if "spectra" in end]
    if not found:
        axes.text(0.5, 0.5, "known at the end", ha="center", transform=axes.transAxes, color=_BOUND)
    else:
        axes.set_yscale("log")
    for run, spectra in found:
        labels = dict.fromkeys(spectra, run.name) if len(runs) > 1 else _labels(spectra)
        kinds = list(dict.fromkeys(labels.values()))
        for name, values in spectra.items():
            color = f"C{runs.index(run) if len(runs) > 1 else kinds.index(labels[name])}"
            axes.plot(range(1, len(values) + 1), values, color=color, linewidth=0.9)
        for number, label in enumerate(kinds):
            axes.plot([], [], color=f"C{runs.index(run) if len(runs) > 1 else number}", label=label)
    _finish(axes, "singular values of the accumulated update", "place")


def draw_speed(axes: Axes, runs: Sequence[Recorded]) -> None:
    """Draw tokens a second."""
    for number, run in enumerate(runs):
        color, label = (_HELD_OUT, "_") if len(runs) == 1 else (f"C{number}", run.name)
        _plot(axes, run.trained, "tokens_per_second", color, label)
    _finish(axes, "tokens a second", "optimizer step")
    axes.set_ylim(bottom=0)


def draw_memory(axes: Axes, runs: Sequence[Recorded]) -> None:
    """Draw the peak memory of the process that took most."""
    for number, run in enumerate(runs):
        color, label = (_HELD_OUT, "_") if len(runs) == 1 else (f"C{number}", run.name)
        points = [r for r in run.trained if r.get("peak_memory") is not None]
        values = [r["peak_memory"] / 2**30 for r in points]
        axes.plot([r["step"] for r in points], values, color=color, label=label)
    _finish(axes, "peak memory of a process, GiB", "optimizer step")
    axes.set_ylim(bottom=0)


def mark_phases(axes: Axes, run: Recorded) -> None:
    """Mark restarts, dotted, and the end of the warm start, black."""
    for record in run.restarts:
        axes.axvline(record["step"], color=_RESTART, linewidth=0.8, linestyle=":")
    if run.handed_over is not None:
        axes.axvline(run.handed_over, color="black", linewidth=0.8)


def _draw_each_rank(axes: Axes, run: Recorded) -> None:
    measured = run.ranks
    cycles = [cycle for cycle, _ in measured]
    labels = _labels(measured[0][1]["ranks"])
    kinds = list(dict.fromkeys(labels.values()))
    for name, label in labels.items():
        color = f"C{kinds.index(label)}"
        for measure, style in ((ranks, "-o"), (effective_ranks, ":")):
            values = [of[name] for _, record in measured if name in (of := measure(record))]
            axes.plot(cycles[: len(values)], values, style, color=color, markersize=4)
    for number, label in enumerate(kinds):
        axes.plot([], [], color=f"C{number}", label=label)
    bound = [record["bound"] for _, record in run.ranks]
    axes.plot(cycles, bound, color=_BOUND, linestyle="--", label="bound k·r")
    axes.set_xticks(cycles)


def _labels(names: Collection[str]) -> dict[str, str]:
    """Return the legend's label of each matrix: its name or, if there are many, its kind."""
    if len(names) <= _MOST_NAMED:
        return {name: name.removeprefix("model.") for name in names}
    return {name: name.rpartition(".")[2] for name in names}


def _plot(
    axes: Axes,
    records: Sequence[_Record],
    key: str,
    color: str,
    label: str,
    alpha: float = 1.0,
) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label, alpha=alpha)


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(below)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7)

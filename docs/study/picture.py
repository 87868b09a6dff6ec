"""The figure of a study: losses, ranks of all matrices, and spectra of the learned changes."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reference_trainer.files import replaced
from study.tables import Record, by_arm, spectra_of
from study.trial import FULL, LORA, PLAIN, RELORA

_COLORS = {FULL: "black", PLAIN: "#969696", LORA: "#08519c", RELORA: "#d94801"}


def draw(sizes: Sequence[Sequence[Record]], picture: Path) -> None:
    """Draw one row of plots for each model size.

    Args:
        sizes: records of each size.
        picture: PNG file to write.
    """
    figure = Figure(figsize=(12, 3.6 * len(sizes)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, records in zip(figure.subplots(len(sizes), 3, squeeze=False), sizes, strict=True):
        loss, rank, spectrum = row
        _draw_loss(loss, records)
        _draw_rank(rank, records)
        _draw_spectrum(spectrum, records)
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
    first = sizes[0][0]
    devices = dict.fromkeys(record["device"] for records in sizes for record in records)
    where = f"{', '.join(devices)}, torch {first['torch']}"
    figure.suptitle(
        f"{where} · mean over seeds, lowest to highest shaded",
        fontsize=8,
        color="#525252",
    )
    with replaced(picture) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _draw_loss(axes: Axes, records: Sequence[Record]) -> None:
    arms = by_arm(records)
    for name, color in _COLORS.items():
        curves = [trial["curve"] for trial in arms.get(name, []) if not trial["diverged"]]
        if not curves:
            continue
        steps = [step for step, *_ in curves[0]]
        columns = [[curve[i][1] for curve in curves] for i in range(len(steps))]
        axes.plot(steps, [statistics.mean(c) for c in columns], color=color, label=name)
        axes.fill_between(
            steps, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.25
        )
    ends = [t["curve"][-1][1] for trials in arms.values() for t in trials if not t["diverged"]]
    if ends:
        axes.set_ylim(0.95 * min(ends), 1.6 * min(ends))
    axes.set_title(f"{records[0]['model']}: held-out loss, nats a byte", loc="left", fontsize=9)
    axes.set_xlabel("step")
    _legend(axes)


def _draw_rank(axes: Axes, records: Sequence[Record]) -> None:
    """Draw rank(W_k - W_0) of every matrix; labels count the lines that coincide."""
    trials = [t for t in by_arm(records).get(RELORA, []) if not t["diverged"]]
    found = [ranks for trial in trials for ranks in trial["ranks"].values()]
    axes.set_title("rank of W_k - W_0, every matrix of every seed", loc="left", fontsize=9)
    axes.set_xlabel("cycles merged, k")
    if not found:
        return
    cycles = range(1, len(found[0]) + 1)
    for ranks in found:
        axes.plot(cycles, ranks, color=_COLORS[RELORA], alpha=0.3, marker="o", markersize=4)
    for cycle in cycles:
        at = [ranks[cycle - 1] for ranks in found]
        for rank in set(at):
            axes.annotate(
                f"{at.count(rank)}",
                (cycle, rank),
                fontsize=7,
                xytext=(4, -9),
                textcoords="offset points",
            )
    bound = [cycle * trials[0]["rank"] for cycle in cycles]
    axes.plot(cycles, bound, color="#969696", linestyle="--", label="bound k·r")
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(cycles))
    _legend(axes)


def _draw_spectrum(axes: Axes, records: Sequence[Record]) -> None:
    arms = by_arm(records)
    for name, color in _COLORS.items():
        found = [s.values.tolist() for trial in arms.get(name, []) for s in spectra_of(trial)]
        if not found or name == PLAIN:
            continue
        places = range(min(map(len, found)))
        columns = [sorted(values[i] for values in found) for i in places]
        quarter = len(found) // 4
        low, high = ([c[k] for c in columns] for k in (quarter, len(found) - 1 - quarter))
        axes.plot(
            [p + 1 for p in places],
            [statistics.median(c) for c in columns],
            color=color,
            label=name,
            marker="o",
            markersize=3,
        )
        axes.fill_between([p + 1 for p in places], low, high, color=color, alpha=0.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("singular values of W - W_0 at the end (quartiles)", loc="left", fontsize=9)
    axes.set_xlabel("index of the singular value")
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)

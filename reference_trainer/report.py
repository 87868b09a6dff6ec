"""One picture of a run, drawn from its metrics.jsonl: loss, learning rate, rank and throughput."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reference_trainer.errors import UserError
from reference_trainer.files import replaced
from reference_trainer.metrics import read

_TRAIN, _HELD_OUT, _RESTART, _BOUND = "#9ecae1", "#08519c", "#d94801", "#969696"
_MOST_NAMED = 10  # matrices; of more, those of a kind share a line of the legend


def draw(metrics: Path, picture: Path) -> None:
    """Draw the picture of a run.

    Args:
        metrics: the run's `metrics.jsonl`.
        picture: the PNG to write.

    Raises:
        UserError: if the metrics are absent or hold no step.
    """
    records = read(metrics)
    steps = _of(records, "step")
    if not steps:
        raise UserError(f"{metrics} holds no training step to draw")
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate, rank, speed = figure.subplots(2, 2).flatten()
    _draw_loss(loss, records)
    _draw_rate(rate, steps)
    _draw_rank(rank, records)
    _draw_speed(speed, steps)
    for axes in (loss, rate, speed):
        _mark_restarts(axes, records)
        axes.set_xlabel("optimizer step")
    for axes in (loss, rate, rank, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(records), fontsize=9, color="#525252")
    with replaced(picture) as partial:
        figure.savefig(partial, dpi=110, format="png")


def learned(metrics: Path) -> list[str]:
    """Return three lines: loss, restarts and rank reached."""
    records = read(metrics)
    held_out = _of(records, "evaluation")
    restarts, ends = _of(records, "restart"), _of(records, "end")
    first, last = held_out[0], held_out[-1]
    handed_over = next((r for r in reversed(held_out) if r["phase"] == "warm-start"), None)
    lines = [
        f"held-out loss: {first['held_out_loss']:.3f} nats a token at the start"
        + (f", {handed_over['held_out_loss']:.3f} after the warm start" if handed_over else "")
        + f", {last['held_out_loss']:.3f} at the end"
    ]
    if restarts:
        zeroed = sum(r["zeroed_fraction"] for r in restarts) / len(restarts)
        lines.append(
            f"restarts: {len(restarts)}, each merging {restarts[-1]['sites']} matrices and zeroing "
            f"{zeroed:.1%} of the adapters' moments"
        )
    else:
        lines.append("restarts: none")
    if ends and ends[-1]["ranks"]:
        ranks, r = ends[-1]["ranks"].values(), _rank(records)
        cycles = ends[-1]["cycles"]
        lines.append(
            f"rank of the accumulated update: {min(ranks)} to {max(ranks)} after {cycles} cycles "
            f"of rank {r} (bound {cycles * r})"
        )
    else:
        lines.append("rank of the accumulated update: not measured")
    return lines


def _draw_loss(axes: Axes, records: list[dict[str, Any]]) -> None:
    steps, held_out = _of(records, "step"), _of(records, "evaluation")
    axes.plot(_column(steps, "step"), _column(steps, "loss"), color=_TRAIN, label="training")
    axes.plot(
        _column(held_out, "step"),
        _column(held_out, "held_out_loss"),
        color=_HELD_OUT,
        marker="o",
        markersize=4,
        label="held out",
    )
    axes.set_title("loss, nats a token", loc="left")
    axes.legend(frameon=False)


def _draw_rate(axes: Axes, steps: list[dict[str, Any]]) -> None:
    for key, label, color in (
        ("lr_adapters", "adapters", _RESTART),
        ("lr_matrices", "other matrices", _HELD_OUT),
    ):
        having = [record for record in steps if key in record]
        if having:
            axes.plot(_column(having, "step"), _column(having, key), color=color, label=label)
    axes.set_title("learning rate", loc="left")
    axes.legend(frameon=False)


def _draw_rank(axes: Axes, records: list[dict[str, Any]]) -> None:
    measured = [(record["restart"], record) for record in _of(records, "restart")]
    measured += [(record["cycles"], record) for record in _of(records, "end")]
    measured = [(cycles, record) for cycles, record in measured if record["ranks"]]
    axes.set_title("rank of the accumulated update (dotted: effective rank)", loc="left")
    axes.set_xlabel("cycles merged")
    if not measured:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=_BOUND)
        return
    cycles = [cycle for cycle, _ in measured]
    names = list(measured[0][1]["ranks"])
    labels = {name: name.removeprefix("model.") for name in names}
    if len(names) > _MOST_NAMED:
        labels = {name: name.rpartition(".")[2] for name in names}
    kinds = list(dict.fromkeys(labels.values()))
    for name, label in labels.items():
        color = f"C{kinds.index(label)}"
        for key, style in (("ranks", "-o"), ("effective_ranks", ":")):
            values = [record[key][name] for _, record in measured if key in record]
            axes.plot(cycles[: len(values)], values, style, color=color, markersize=4)
    for number, label in enumerate(kinds):
        axes.plot([], [], color=f"C{number}", label=label)
    bound = [cycle * _rank(records) for cycle in cycles]
    axes.plot(cycles, bound, color=_BOUND, linestyle="--", label="bound k·r")
    axes.set_ylim(bottom=0)
    axes.set_xticks(cycles)
    axes.legend(frameon=False, fontsize=7)


def _draw_speed(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.plot(_column(steps, "step"), _column(steps, "tokens_per_second"), color=_HELD_OUT)
    axes.set_ylim(bottom=0)
    axes.set_title("tokens a second", loc="left")


def _mark_restarts(axes: Axes, records: list[dict[str, Any]]) -> None:
    for record in _of(records, "restart"):
        axes.axvline(record["step"], color=_RESTART, linewidth=0.8, linestyle=":")
    begun = [r["step"] for r in _of(records, "evaluation") if r["phase"] == "relora"]
    if begun and begun[0] > 0:
        axes.axvline(begun[0], color="black", linewidth=0.8)


def _title(records: list[dict[str, Any]]) -> str:
    start = (_of(records, "start") or [{}])[-1]
    known = [
        str(start.get("device", "")),
        f"{start.get('processes', '?')} process(es), {start.get('threads', '?')} threads",
        f"torch {start.get('torch', '?')}, Python {start.get('python', '?')}",
        f"seed {start.get('seed', '?')}",
    ]
    return " · ".join(part for part in known if part) + (
        "\nblack: end of the warm start; dotted: restarts"
    )


def _rank(records: list[dict[str, Any]]) -> int:
    return int(_of(records, "start")[-1]["rank"])


def _of(records: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == event]


def _column(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records]

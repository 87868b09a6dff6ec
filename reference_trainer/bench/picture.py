"""The figure of a measurement: the ratio of each arm to the first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reference_trainer.bench.results import by_subject, ratio, spread
from reference_trainer.files import replaced

_OURS, _OTHERS, _FLOPS = "#d94801", "#9ecae1", "black"


def draw(measurements: Sequence[Sequence[dict[str, Any]]], picture: Path) -> None:
    """Draw measurements side by side: bars for time ratios, dotted ticks for operation ratios.

    Args:
        measurements: records of each run of `bench`, with enough repeats for a ratio.
        picture: PNG file to write.
    """
    panels = [
        (records[0], subject, arms)
        for records in measurements
        for subject, arms in by_subject(records)
    ]
    figure = Figure(figsize=(1.5 + 3.4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (first, subject, arms) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for place, arm in enumerate(arms):
            quartiles = ratio(arm["step_seconds"], arms[0]["step_seconds"])
            assert quartiles is not None
            color = _OURS if arm["arm"].startswith(("ours", "restart", "magnitude")) else _OTHERS
            axes.barh(place, quartiles.median, color=color)
            axes.plot([quartiles.low, quartiles.high], [place, place], color="#525252")
            if "flops" in arm:
                share = arm["flops"] / arms[0]["flops"]
                axes.plot([share, share], [place - 0.4, place + 0.4], color=_FLOPS, linestyle=":")
        axes.axvline(1.0, color="#969696", linewidth=0.8)
        axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
        axes.invert_yaxis()
        base = spread(arms[0]["step_seconds"]).median
        axes.set_xlabel(f"time of a step (1 = {base * 1e3:,.0f} ms)")
        detail = [str(first[key]) for key in ("model", "dtype") if key in first]
        axes.set_title(", ".join([subject, *detail]), loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    where = measurements[0][0]
    figure.suptitle(
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}"
        " · dotted: floating-point operations · line: quartiles",
        fontsize=8,
        color="#525252",
    )
    with replaced(picture) as partial:
        figure.savefig(partial, dpi=110, format="png")

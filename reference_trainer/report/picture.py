"""One picture of a run: loss, learning rate, rank and throughput."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reference_trainer.files import replaced
from reference_trainer.report.panels import (
    draw_loss,
    draw_rank,
    draw_rate,
    draw_speed,
    mark_phases,
)
from reference_trainer.report.recorded import Recorded


def draw(run: Recorded, picture: Path) -> None:
    """Draw the picture of a run.

    Args:
        run: the run to draw.
        picture: the PNG to write.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (draw_loss, draw_rate, draw_rank, draw_speed)
    for axes, panel in zip(figure.subplots(2, 2).flatten(), panels, strict=True):
        panel(axes, [run])
        if panel is not draw_rank:
            mark_phases(axes, run)
    figure.suptitle(_title(run), fontsize=9, color="#525252")
    with replaced(picture) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _title(run: Recorded) -> str:
    start = run.start
    known = [
        str(start["device"]),
        f"{start['processes']} process(es), {start['threads']} threads",
        f"torch {start['torch']}, Python {start['python']}",
        f"seed {start['seed']}",
    ]
    return " · ".join(known) + "\nblack: end of the warm start; dotted: restarts"

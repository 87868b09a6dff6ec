"""The Markdown tables of a study."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from reference_trainer.bench import markdown
from relora_core import Spectrum
from study.plans import TUNING_SEED
from study.trial import FULL, LORA, RELORA

Record = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The cost of a step after the warm start, relative to a full-rank step.

    Args:
        operations: ratio of floating-point operations; None if full rank was not run.
        time: ratio of times, measured in alternation; None if it was not measured.
    """

    operations: float | None
    time: float | None


def rates(records: Iterable[Record]) -> str:
    """Return the table of tuning trials: each arm's held-out loss by rate, the lowest in bold."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["seed"] == TUNING_SEED:
            found.setdefault(record["arm"], []).append(record)
    rows = []
    for arm, trials in found.items():
        rate = "lr_multiple" if trials[0]["rank"] else "lr"
        best = min(map(_end, trials))
        shown = []
        for trial in sorted(trials, key=lambda trial: float(trial[rate])):
            loss = f"**{_end(trial):.4f}**" if _end(trial) == best else f"{_end(trial):.4f}"
            of = f"{trial['lr']:g}"
            shown.append(f"{of}: {loss}" if rate == "lr" else f"{trial[rate]:g} x {of}: {loss}")
        rows.append([arm, ", ".join(shown)])
    return markdown.table(["arm", "held-out loss by learning rate"], rows)


def outcomes(records: Sequence[Record], names: Iterable[str], time: float | None) -> str:
    """Return the table of some arms: the final loss over seeds, and the cost of each arm.

    Args:
        records: records of one model size.
        names: names of the arms to show; arms without a trial are left out.
        time: ratio of the time of a step with low-rank sites to a full-rank step; None if it was
            not measured.
    """
    arms = by_arm(records)
    target = _ends(arms.get(LORA, []))
    header = ["arm", "held-out loss: mean ± deviation (lowest to highest)", "seeds"]
    header += [f"difference from {LORA}, same seed", "operations", "time", "both until its loss"]
    rows = []
    for name, trials in arms.items():
        if name not in names:
            continue
        ends = _ends(trials)
        if not ends:
            rows.append([name, "diverged", f"{len(trials)}", "-", "-", "-", "-"])
            continue
        shown = (
            f"{statistics.mean(ends):.4f}{_deviation(ends)} ({min(ends):.4f} to {max(ends):.4f})"
        )
        if len(ends) < len(trials):
            shown += f", {len(trials) - len(ends)} diverged"
        apart = "-" if name == LORA else _apart(trials, arms.get(LORA, []))
        sound = next(trial for trial in trials if not trial["diverged"])
        cost = Cost(_operations(sound, records), time if trials[0]["rank"] else 1.0)
        reached = [_reached(t, statistics.mean(target)) for t in trials] if target else []
        costs = [_share(trials[0], cost.operations), _share(trials[0], cost.time)]
        until = _until(trials[0], reached, cost)
        rows.append([name, shown, f"{len(trials)}", apart, *costs, until])
    return markdown.table(header, rows)


def spectra(records: Sequence[Record]) -> str:
    """Return the table of ranks of the change since the warm start, as medians over matrices."""
    rows = []
    for name, trials in by_arm(records).items():
        found = [spectrum for trial in trials for spectrum in spectra_of(trial)]
        if name not in (FULL, LORA, RELORA) or not found:
            continue
        matrices = len(found) // sum(bool(trial["spectra"]) for trial in trials)
        ranks = statistics.median(len(spectrum.values) for spectrum in found)
        effective = statistics.median(spectrum.effective_rank for spectrum in found)
        stable = statistics.median(spectrum.stable_rank for spectrum in found)
        seeds = len(found) // matrices
        over = f"{matrices} matrices, {seeds} seed{'s' if seeds > 1 else ''}"
        rows.append([name, f"{ranks:g}", f"{effective:.1f}", f"{stable:.1f}", over])
    header = ["arm", "rank", "effective rank", "stable rank", "medians over"]
    return markdown.table(header, rows)


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the trials of every arm, except tuning trials."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["seed"] != TUNING_SEED:
            found.setdefault(record["arm"], []).append(record)
    return found


def spectra_of(trial: Record) -> list[Spectrum]:
    """Return the spectrum of each matrix's change since the warm start."""
    values = trial["spectra"].values()
    return [Spectrum(torch.tensor(v, dtype=torch.float64), (len(v), len(v))) for v in values]


def _end(trial: Record) -> float:
    return float("inf") if trial["diverged"] else float(trial["curve"][-1][1])


def _ends(trials: Iterable[Record]) -> list[float]:
    return [_end(trial) for trial in trials if not trial["diverged"]]


def _deviation(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


def _apart(trials: Sequence[Record], others: Sequence[Record]) -> str:
    """Return the mean and deviation of the differences between trials with the same seed."""
    of_seed = {trial["seed"]: _end(trial) for trial in others if not trial["diverged"]}
    compared = [t for t in trials if t["seed"] in of_seed and not t["diverged"]]
    found = [_end(trial) - of_seed[trial["seed"]] for trial in compared]
    if not found:
        return "-"
    return f"{statistics.mean(found):+.4f}{_deviation(found)}"


def _operations(trial: Record, records: Iterable[Record]) -> float | None:
    """Return the operations of a step after the warm start, relative to a full-rank step."""
    whole = (r for r in records if r["arm"] == FULL and not r["diverged"])
    full = next((r["flops"] / r["steps"] for r in whole), None)
    warm = round(trial["warm_start"] * trial["steps"])
    if full is None:
        return None
    return float((trial["flops"] - warm * full) / (trial["steps"] - warm) / full)


def _until(trial: Record, reached: Sequence[float | None], cost: Cost) -> str:
    steps = [step for step in reached if step is not None]
    if trial["arm"] == LORA or not reached:
        return "-"
    if len(steps) < len(reached):
        return "not reached"
    mean = statistics.mean(steps)
    both = (_share(trial, ratio, mean) for ratio in (cost.operations, cost.time))
    return ", ".join(both)


def _share(trial: Record, ratio: float | None, step: float | None = None) -> str:
    """Return the cost of a trial up to a step, relative to all its steps at full rank."""
    if ratio is None:
        return "-"
    warm, step = round(trial["warm_start"] * trial["steps"]), step or trial["steps"]
    cost = min(step, warm) + max(0.0, step - warm) * ratio
    return f"{cost / trial['steps']:.2f}"


def _reached(trial: Record, loss: float) -> float | None:
    """Return the step at which the held-out loss falls to `loss`, interpolated; None if never."""
    points = [(step, held_out) for step, held_out, _ in trial["curve"]]
    for (before, high), (step, low) in pairwise(points):
        if low <= loss < high:
            return float(before + (step - before) * (high - loss) / (high - low))
    return None

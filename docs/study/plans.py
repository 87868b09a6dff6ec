"""The plans of a study: its trials, with every arm's learning rate tuned by the same rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reference_trainer.errors import UserError
from study.trial import FULL, LORA, PLAIN, RELORA, Arm, Trial

TUNING_SEED, SEEDS = 100, (0, 1, 2)
RATE, MULTIPLE = 1e-3, 4.0  # where the search for the best rates begins


@dataclass(frozen=True)
class Scale:
    """The size of a study.

    Args:
        model: preset of the model's shape.
        rank: rank of the sites, at most 1/48 of the model's width.
        steps: number of steps in every trial.
        cycles: number of cycles in ReLoRA's trials.
    """

    model: str
    rank: int
    steps: int = 6000
    cycles: int = 4


SCALES = {scale.model: scale for scale in (Scale("1m", rank=2), Scale("2m", rank=4))}


def tune(scale: Scale, records: Sequence[dict[str, Any]]) -> list[Trial]:
    """Return the trials that tune full rank's learning rate, then each arm's factor rate.

    The search is the same for every arm. It tries a rate and its double, then continues in the
    direction of the better one until the best rate lies between two worse rates. Later trials
    depend on the results of earlier ones.
    """
    trials = _search(scale, records, Arm(FULL, RATE), "lr")
    if left(trials, records):
        return trials
    lr = best(records, FULL)["lr"]
    for arm in _tuned(scale):
        first = replace(arm, lr=lr, lr_multiple=MULTIPLE)
        trials += _search(scale, records, first, "lr_multiple")
    return trials


def arms(scale: Scale, records: Sequence[dict[str, Any]]) -> list[Trial]:
    """Return the trials of the paper's four arms, for every seed."""
    chosen = [*_tuned(scale)[1:], Arm(FULL, 0.0), _tuned(scale)[0]]
    best = [_at_its_best(scale, records, arm) for arm in chosen]
    return [_trial(scale, arm, seed) for seed in SEEDS for arm in best]


def ablation(scale: Scale, records: Sequence[dict[str, Any]]) -> list[Trial]:
    """Return trials of LoRA without a warm start that add ReLoRA's components one at a time."""
    lora = _at_its_best(scale, records, _tuned(scale)[0])
    restarts = replace(lora, cycles=scale.cycles)
    chosen = [
        replace(restarts, name=f"{PLAIN}, restarts", prune_ratio=None, rewarm=0.0),
        replace(restarts, name=f"{PLAIN}, restarts, reset", rewarm=0.0),
        replace(restarts, name=f"{PLAIN}, restarts, reset, jagged"),
    ]
    return [_trial(scale, arm, seed) for seed in SEEDS for arm in chosen]


def sweeps(scale: Scale, records: Sequence[dict[str, Any]]) -> list[Trial]:
    """Return trials of ReLoRA with other prune ratios, cycles and ranks, and LoRA of these ranks.

    All trials use one seed, because arms compare more precisely within a seed than between seeds.
    """
    _, lora, relora = (_at_its_best(scale, records, arm) for arm in _tuned(scale))
    chosen = [
        replace(relora, name=f"ReLoRA, prune {ratio:g}", prune_ratio=ratio)
        for ratio in (0.0, 0.8, 0.9, 1.0)
    ]
    chosen += [
        replace(relora, name=f"ReLoRA, {cycles} cycles", cycles=cycles) for cycles in (2, 8, 16)
    ]
    chosen += [
        replace(arm, name=f"{name} of rank {rank}", rank=rank)
        for rank in (scale.rank // 2, 2 * scale.rank, 4 * scale.rank)
        for arm, name in ((lora, "LoRA"), (relora, "ReLoRA"))
    ]
    return [_trial(scale, arm, SEEDS[0]) for arm in chosen]


Plan = Callable[[Scale, Sequence[dict[str, Any]]], list[Trial]]
PLANS: dict[str, Plan] = {"tune": tune, "arms": arms, "ablation": ablation, "sweeps": sweeps}


def left(trials: Sequence[Trial], records: Sequence[dict[str, Any]]) -> list[Trial]:
    """Return the trials that have no record yet."""
    return [trial for trial in trials if not any(map(trial.is_of, records))]


def best(records: Sequence[dict[str, Any]], arm: str) -> dict[str, Any]:
    """Return the tuning trial of the arm with the lowest held-out loss at the end.

    Raises:
        UserError: if no trial has tuned the arm.
    """
    found = [r for r in records if r["arm"] == arm and r["seed"] == TUNING_SEED]
    if not found:
        raise UserError(f"no trial has tuned {arm!r}: run the plan 'tune' first, to this file")
    return min(found, key=_end)


def _end(record: dict[str, Any]) -> tuple[bool, float]:
    return record["diverged"], record["curve"][-1][1]


def _search(scale: Scale, records: Sequence[dict[str, Any]], first: Arm, name: str) -> list[Trial]:
    """Return trials with rate `name` doubled or halved until the best rate is between others."""
    rates = [getattr(first, name), 2 * getattr(first, name)]
    while True:
        trials = [
            _trial(scale, replace(first, **{name: rate}), TUNING_SEED) for rate in sorted(rates)
        ]
        if left(trials, records):
            return trials
        ends = [_end(next(filter(trial.is_of, records))) for trial in trials]
        place = ends.index(min(ends))
        if place not in (0, len(ends) - 1):
            return trials
        rates.append(2 * max(rates) if place else min(rates) / 2)


def _tuned(scale: Scale) -> list[Arm]:
    warm = Arm(LORA, 0.0, rank=scale.rank)
    lora = replace(warm, name=PLAIN, warm_start=0.0)
    return [lora, warm, replace(warm, name=RELORA, cycles=scale.cycles)]


def _at_its_best(scale: Scale, records: Sequence[dict[str, Any]], arm: Arm) -> Arm:
    found = best([r for r in records if r["steps"] == scale.steps], arm.name)
    return replace(arm, lr=found["lr"], lr_multiple=found["lr_multiple"])


def _trial(scale: Scale, arm: Arm, seed: int) -> Trial:
    return Trial(scale.model, arm, seed, scale.steps)

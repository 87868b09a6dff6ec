"""One trial, in one process: the primitives in a loop of their own, without the trainer's."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

import relora_core as relora
from reference_trainer.data import Batches, Windows, open_windows
from reference_trainer.flops import step_flops
from reference_trainer.model import Llama
from reference_trainer.parallel import init_weights_
from reference_trainer.rank import values_of
from reference_trainer.stage import Envelope
from reference_trainer.study.trial import Trial
from reference_trainer.terminal import hidden

TARGETS = ("*.self_attn.*", "*.mlp.*")
WARMUP, MIN_RATIO = 100, 0.1  # of the cosine: steps at the start, and its end
EVALUATIONS, WINDOWS = 24, 256  # of a trial; of an evaluation

Loss = Callable[[Tensor, Tensor], Any]


@dataclass
class Course:
    """A model in the middle of a trial, and what was written down of it.

    Args:
        model: what is trained.
        optimizer: its.
        step: the next one.
        curve: [step, held-out loss, training loss since the one before], in nats a token.
        seconds: of each step.
    """

    model: Llama
    optimizer: AdamW
    step: int = 0
    curve: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite, which ends a trial."""
        return bool(self.curve) and not math.isfinite(self.curve[-1][2])


def run_trial(trial: Trial, data: Path, *, compiled: bool) -> dict[str, Any]:
    """Run a trial and return its record.

    Args:
        trial: which.
        data: a directory of prepared bytes.
        compiled: whether steps are compiled, which needs a C++ compiler.
    """
    course = copy.deepcopy(_warm_start(trial.of_full_rank(), data, compiled))
    first = _weights(course.model)
    if trial.arm.rank:
        ranks = _low_rank(course, trial, data, compiled)
    else:
        _full_rank(course, trial, data, compiled)
        ranks = {name: [] for name in first}
    warm, rest = trial.warm_steps, course.step - trial.warm_steps
    sizes = {"sequences": trial.sequences, "length": trial.length, "rank": trial.arm.rank}
    full = step_flops("full rank", trial.shape, **sizes)
    after = step_flops("two paths", trial.shape, **sizes) if trial.arm.rank else full
    spectra: dict[str, list[float]] = {}
    if not course.diverged:
        last = _weights(course.model)
        spectra = {n: values_of(relora.Spectrum.of(last[n] - W)) for n, W in first.items()}
    return {
        "event": "trial",
        **trial.key(),
        "curve": course.curve,
        "diverged": course.diverged,
        "flops": warm * full + rest * after,
        "seconds_a_step": [median(s) for s in (course.seconds[:warm], course.seconds[warm:]) if s],
        "ranks": ranks,
        "spectra": spectra,
    }


@lru_cache(maxsize=1)
def _warm_start(trial: Trial, data: Path, compiled: bool) -> Course:
    """Return what the arms of a seed have in common: the first steps of full rank."""
    model = Llama(trial.shape)
    named: dict[str, Tensor] = dict(model.named_parameters())
    init_weights_(named, hidden_size=trial.shape.hidden_size, seed=trial.seed)
    optimizer = _adamw([{"params": list(model.parameters()), "lr": trial.arm.lr}])
    course = Course(model, optimizer)
    schedule = LambdaLR(optimizer, Envelope(0, trial.steps, WARMUP, MIN_RATIO))
    _train(course, trial, trial.warm_steps, schedule, data, compiled)
    return course


def _full_rank(course: Course, trial: Trial, data: Path, compiled: bool) -> None:
    """Go on in full rank, as if there had been no phases."""
    envelope = Envelope(course.step, trial.steps, 0, MIN_RATIO)
    _train(course, trial, trial.steps, LambdaLR(course.optimizer, envelope), data, compiled)


def _low_rank(course: Course, trial: Trial, data: Path, compiled: bool) -> dict[str, list[int]]:
    """Train the rest of the steps with low-rank sites; return each one's rank after each cycle."""
    arm, model, before = trial.arm, course.model, course.optimizer.state
    relora.add_low_rank_(model, TARGETS, rank=arm.rank, seed=trial.seed)
    sites = dict(relora.low_rank_sites(model))
    first = {name: site.exact().clone() for name, site in sites.items()}
    factors = [p for site in sites.values() for p in (site.lora_A, site.lora_B)]
    own = {id(p) for p in factors}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    course.optimizer = _adamw(
        [{"params": factors, "lr": arm.lr * arm.lr_multiple}, {"params": rest, "lr": arm.lr}]
    )
    for p in rest:
        if p in before:
            course.optimizer.state[p] = before[p]

    start, restarts = course.step, None
    envelope = Envelope(start, trial.steps, WARMUP, MIN_RATIO)
    schedule: LRScheduler = LambdaLR(course.optimizer, envelope)
    if arm.cycles > 1:
        restarts = relora.Restarts(trial.period, max(1, round(arm.rewarm * trial.period)))
        if arm.rewarm:
            schedule = relora.JaggedLR(schedule, restarts)
    ranks: dict[str, list[int]] = {name: [] for name in sites}

    def measure() -> None:
        for name, site in sites.items():
            ranks[name].append(relora.Spectrum.of(site.merged() - first[name]).rank())

    def before_step(step: int) -> None:
        if restarts is None or not restarts.at(step - start):
            return
        measure()
        if arm.prune_ratio is None:
            relora.merge_(model)
            relora.reinit_(model)
        else:
            relora.restart_(model, course.optimizer, prune_ratio=arm.prune_ratio)

    _train(course, trial, trial.steps, schedule, data, compiled, before_step)
    if not course.diverged:
        measure()
    return ranks


def _train(
    course: Course,
    trial: Trial,
    stop: int,
    schedule: LRScheduler,
    data: Path,
    compiled: bool,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    batches = Batches(open_windows(data, "train", trial.length), trial.sequences, trial.seed)
    held_out = open_windows(data, "held_out", trial.length)
    torch._dynamo.reset()
    loss_of: Loss = torch.compile(course.model) if compiled else course.model
    trained = [p for p in course.model.parameters() if p.requires_grad]
    every = max(1, trial.steps // EVALUATIONS)
    losses: list[float] = []
    label = f"{trial.model} {trial.arm.name}, seed {trial.seed}"
    todo = range(course.step, stop)
    steps = tqdm(todo, label, initial=course.step, total=trial.steps, disable=hidden())
    for step in steps:
        before_step(step)
        batch = batches.at(step)
        began = time.perf_counter()
        loss = loss_of(batch[:, :-1], batch[:, 1:])
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        course.optimizer.step()
        course.optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        course.seconds.append(time.perf_counter() - began)
        course.step = step + 1
        broken = not math.isfinite(losses[-1])
        if broken or course.step % every == 0 or course.step == stop:
            mean = sum(losses) / len(losses)
            course.curve.append([course.step, _evaluate(loss_of, held_out, trial), mean])
            losses = []
        if broken:
            return


@torch.no_grad()
def _evaluate(loss_of: Loss, held_out: Windows, trial: Trial) -> float:
    count = min(WINDOWS, len(held_out))
    places = np.arange(count, dtype=np.uint64) * np.uint64(len(held_out)) // np.uint64(count)
    parts = torch.split(held_out.read(places), trial.sequences)
    return float(sum(loss_of(p[:, :-1], p[:, 1:]).item() * len(p) for p in parts) / count)


def _adamw(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _weights(model: Llama) -> dict[str, Tensor]:
    """Return each target's weight, whatever was merged or not, by the module's name."""
    merged = relora.merged_state_dict(model)
    modules = {name.removesuffix(".weight"): tensor for name, tensor in merged.items()}
    return {
        name: tensor.clone()
        for name, tensor in modules.items()
        if any(fnmatchcase(name, target) for target in TARGETS)
    }

"""The run of one trial by the trainer, and its record."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from reference_trainer import options
from reference_trainer.checkpoint.format import folder_of
from reference_trainer.config import Config
from reference_trainer.errors import SharedError
from reference_trainer.flops import step_flops
from reference_trainer.logging.metrics import read
from reference_trainer.logging.records import Record
from reference_trainer.logging.spectra import values_of
from reference_trainer.run_directory import begun
from reference_trainer.train import train
from relora_core import Spectrum
from study.trial import Trial

WARMUP = 100  # steps of the cosine's warm-up
EVALUATIONS, WINDOWS = 24, 256  # evaluations in a trial; windows in an evaluation


def run_trial(trial: Trial, data: Path, runs: Path, *, compiled: bool) -> dict[str, Any]:
    """Train a trial, or resume it if it was interrupted, and return its record.

    The record has the trial's key and these entries:

    - `curve`: points [step, held-out loss, mean training loss since the previous point], in nats
      per token.
    - `diverged`: whether ten steps in a row had a loss or gradient that was not finite.
    - `flops`: floating-point operations of all steps.
    - `seconds_a_step`: median seconds per step, in the warm start and after it.
    - `ranks`: rank of W - W_0 after each cycle, by matrix. W_0 is W at the end of the warm start.
    - `spectra`: singular values of W - W_0 at the end, by matrix.

    Args:
        trial: trial to run.
        data: directory of prepared bytes.
        runs: directory of all trials' runs.
        compiled: whether to compile steps, which needs a C++ compiler.
    """
    config = config_of(trial, data, runs, compiled=compiled)
    diverged = False
    try:
        train(config, resume=begun(config))
    except SharedError:
        diverged = _has_diverged(config)
        if not diverged:
            raise
    records = read(config.directory / "metrics.jsonl")
    warm, rest = trial.warm_steps, trial.steps - trial.warm_steps
    sizes = {"sequences": trial.sequences, "length": trial.length, "rank": trial.arm.rank}
    full = step_flops("full rank", trial.shape, **sizes)
    after = step_flops("two paths", trial.shape, **sizes) if trial.arm.rank else full
    ranks = [r["ranks"] for r in records if r["event"] == "restart" or r["event"] == "end"]
    spectra = {} if diverged else _spectra(trial, config, records)
    return {
        "event": "trial",
        **trial.key(),
        "curve": _curve(records),
        "diverged": diverged,
        "flops": warm * full + rest * after,
        "seconds_a_step": _seconds(trial, records),
        "ranks": {name: [cycle[name] for cycle in ranks] for name in spectra},
        "spectra": spectra,
    }


def _has_diverged(config: Config) -> bool:
    """Whether the run has ended after too many skipped steps in a row."""
    records, most = read(config.directory / "metrics.jsonl"), config.optim.most_skips
    steps = [r["event"] for r in records if r["event"] == "step" or r["event"] == "skipped"]
    return steps[-most:] == ["skipped"] * most


def config_of(trial: Trial, data: Path, runs: Path, *, compiled: bool) -> Config:
    """Return the trainer's options for a trial.

    The trainer has no option for two arms, which therefore use its smallest values. An arm without
    a reset zeroes one entry, the smallest, of each factor's moments. An arm without a ramp takes a
    single step with a learning rate of 0.
    """
    arm, every = trial.arm, max(1, trial.steps // EVALUATIONS)
    key = blake2b(json.dumps(trial.key()).encode(), digest_size=6).hexdigest()
    given: dict[str, Any] = {
        "name": f"{trial.model}-{key}",
        "runs": str(runs),
        "steps": trial.steps,
        "seed": trial.seed,
        "model.preset": trial.model,
        "data.prepared": str(data),
        "batch.sequences": trial.sequences,
        "batch.micro": trial.sequences,
        "batch.length": trial.length,
        "optim.lr": arm.lr,
        "optim.warmup": WARMUP,
        "log.every": every,
        "log.evaluate_every": every,
        "log.evaluate_sequences": WINDOWS,
        "log.rank_sites": 10_000,
        "parallel.compile": compiled,
        "checkpoint.every": trial.warm_steps or trial.steps,
        "checkpoint.keep": 99,
        "relora.warm_start": trial.warm_steps if arm.rank else trial.steps,
    }
    if arm.rank:
        given |= {
            "relora.rank": arm.rank,
            "relora.every": trial.period,
            "relora.warmup": max(1, round(arm.rewarm * trial.period)),
            "relora.prune_ratio": arm.prune_ratio or 0.0,
            "relora.lr_multiple": arm.lr_multiple,
        }
    return options.resolve(None, given)


def _curve(records: list[Record]) -> list[list[float]]:
    held_out = {r["step"]: r["held_out_loss"] for r in records if r["event"] == "evaluation"}
    trained = {r["step"] + 1: r["loss"] for r in records if r["event"] == "step"}
    steps = sorted(held_out.keys() & trained.keys())
    return [[step, held_out[step], trained[step]] for step in steps]


def _seconds(trial: Trial, records: list[Record]) -> list[float]:
    tokens = trial.sequences * trial.length
    seconds: tuple[list[float], list[float]] = ([], [])
    for r in records:
        if r["event"] == "step":
            seconds[r["step"] >= trial.warm_steps].append(tokens / r["tokens_per_second"])
    return [median(found) for found in seconds if found]


def _spectra(trial: Trial, config: Config, records: list[Record]) -> dict[str, list[float]]:
    ends = [r["spectra"] for r in records if r["event"] == "end" and "spectra" in r]
    if trial.arm.rank:
        return ends[-1]
    first = _weights(folder_of(config.checkpoints, trial.warm_steps))
    last = load_file(config.directory / "export/model.safetensors")
    changes = {name: last[f"{name}.weight"] - W for name, W in first.items()}
    return {name: values_of(Spectrum.of(change)) for name, change in changes.items()}


def _weights(checkpoint: Path) -> Mapping[str, Tensor]:
    """Return the matrices in a one-process checkpoint that are sites in the other arms."""
    (file,) = checkpoint.glob("shard-*.safetensors")
    tensors = load_file(file)
    kinds = (".self_attn.", ".mlp.")
    return {
        name.removeprefix("model.").removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.") and any(kind in name for kind in kinds)
    }

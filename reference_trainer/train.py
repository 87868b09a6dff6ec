"""The training loop: Algorithm 1 of the ReLoRA paper, phase by phase."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import relora_core as relora
from reference_trainer import checkpoint, options
from reference_trainer.config import Config, Phase, phases
from reference_trainer.data import Batches, Windows, open_windows
from reference_trainer.documents import sources
from reference_trainer.errors import UserError
from reference_trainer.files import fresh_directory
from reference_trainer.metrics import Metrics
from reference_trainer.model import Llama, LlamaShape
from reference_trainer.prepare import SPLITS, prepare, read_index
from reference_trainer.rank import RankMeter, spread
from reference_trainer.stage import Stage, build_stage, fill_, prepare_, save
from reference_trainer.tokenizer import load_tokenizer
from reference_trainer.world import World, open_world, world_size

_IGNORED = -100


def train(config: Config, *, resume: bool = False) -> None:
    """Run `config` to its end in `config.directory`.

    Args:
        config: the run.
        resume: go on from the newest complete checkpoint of a run that is there; otherwise the
            directory must not exist.

    Raises:
        UserError: if something given is wrong. A new run leaves nothing behind then.
    """
    check(config)
    with open_world(config.parallel) as world:
        world.on_first(lambda: _open_run(config, resume))
        data = data_directory(config)
        shape = model_shape(config, read_index(data).vocab_size)
        held_out = open_windows(data, "held_out", config.batch.length)
        batches = Batches(
            open_windows(data, "train", config.batch.length), config.batch.sequences, config.seed
        )
        newest = checkpoint.newest(config.directory / "checkpoints")
        step = checkpoint.read_position(newest).step if newest else 0
        writer = Metrics(
            config.directory,
            writes=world.first,
            tensorboard=config.log.tensorboard,
            from_step=step,
        )
        with writer as metrics:
            metrics.write("start", step, **_environment(config, world))
            for phase in phases(config):
                if step < phase.stop:
                    stage = build_stage(config, phase, shape, world)
                    step = fill_(stage, config, newest)
                    newest = run_phase(stage, config, step, batches, held_out, metrics, world)
                    step = phase.stop


def run_phase(
    stage: Stage,
    config: Config,
    start: int,
    batches: Batches,
    held_out: Windows,
    metrics: Metrics,
    world: World,
) -> Path:
    """Train `stage` from the run's step `start` to its phase's end; return the last checkpoint."""
    model, optimizer, phase = stage.model, stage.optimizer, stage.phase
    micro_steps = config.batch.micro_steps(world.size)
    meter = _rank_meter(stage, config, start, world)
    log = _Log(config, stage, metrics, world)
    latest = None
    for step in _progress(range(start, phase.stop), config, phase, world):
        if stage.restarts_at(step):
            log.restart(step, meter)
        if step == start == phase.start:
            log.evaluation(step, evaluate(model, held_out, config, world))

        log.begin()
        loss = forward_backward(model, batches.at(step), micro_steps, world)
        norm = torch.nn.utils.clip_grad_norm_(stage.parameters.values(), config.optim.clip)
        rates = stage.rates()
        optimizer.step()
        stage.schedule.step()
        optimizer.zero_grad()
        log.step(step, loss, norm, rates)

        done = step + 1
        if done % config.log.evaluate_every == 0 or done == phase.stop:
            log.evaluation(done, evaluate(model, held_out, config, world))
        if done % config.checkpoint.every == 0 or done == phase.stop:
            latest = save(stage, config, done, world)
    if meter is not None:
        log.final_ranks(phase.stop, meter)
    assert latest is not None  # a phase ends in a checkpoint
    return latest


def forward_backward(model: Llama, batch: Tensor, micro_steps: int, world: World) -> Tensor:
    """Accumulate the gradient of the whole batch's mean loss; return this process's mean loss.

    Args:
        model: sharded; gradients are reduced at the last micro-batch.
        batch: (sequences, length + 1), the same on every process.
        micro_steps: how often each process runs forward and backward.
        world: the processes; each takes its part of every micro-batch.
    """
    parts = batch.view(micro_steps, world.size, -1, batch.shape[1])[:, world.rank]
    total = torch.zeros((), device=world.device)
    for index, part in enumerate(parts.to(world.device)):
        model.set_requires_gradient_sync(index == micro_steps - 1)  # type: ignore[operator]
        loss = model(part[:, :-1], part[:, 1:]) / micro_steps
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model: Llama, held_out: Windows, config: Config, world: World) -> float:
    """Return the mean loss on held-out tokens, in nats a token; the same at every world size."""
    count = min(config.log.evaluate_sequences, len(held_out))
    a_round = config.batch.micro * world.size
    padded = -(-count // a_round) * a_round
    places = np.arange(padded, dtype=np.uint64) * np.uint64(len(held_out)) // np.uint64(count)
    places[count:] = 0
    windows = held_out.read(places)
    windows[count:, 1:] = _IGNORED
    total = torch.zeros((), device=world.device)
    for part in windows.view(-1, world.size, config.batch.micro, windows.shape[1]):
        mine = part[world.rank].to(world.device)
        tokens = mine[:, :-1].clamp(min=0)
        logits = model(tokens).flatten(0, 1).float()
        total += F.cross_entropy(
            logits, mine[:, 1:].flatten(), reduction="sum", ignore_index=_IGNORED
        )
    model.reshard()  # type: ignore[operator]
    return world.mean(total) * world.size / (count * config.batch.length)


def check(config: Config) -> None:
    """Refuse, before anything is made, what can be seen to be wrong.

    Raises:
        UserError: for files, tokenizer, shape, targets, rank or batch.
    """
    config.batch.micro_steps(world_size())
    if config.data.prepared:
        vocab_size = read_index(Path(config.data.prepared)).vocab_size
    else:
        sources(config.data)
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    shape = model_shape(config, vocab_size)
    for phase in phases(config):
        with torch.device("meta"):
            prepare_(Llama(shape), config, phase)


def model_shape(config: Config, vocab_size: int) -> LlamaShape:
    """Return the model's shape.

    Raises:
        UserError: if its numbers do not fit together.
    """
    try:
        return config.model.shape(vocab_size)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def data_directory(config: Config) -> Path:
    """Return where the run's tokens lie."""
    return Path(config.data.prepared) if config.data.prepared else config.directory / "data"


def _open_run(config: Config, resume: bool) -> None:
    directory = config.directory
    file = directory / "config.yaml"
    if resume:
        if not file.is_file():
            raise UserError(f"{directory} holds no run to resume: start it without --resume")
        different = options.changed(options.resolve(file, {}), config)
        fixed = [path for path in different if not path.startswith(("log.", "checkpoint.", "runs"))]
        if fixed:
            raise UserError(
                f"{directory} was begun with another {', '.join(fixed)} (see its config.yaml): "
                "resume it as it was, or give the new run another --name"
            )
        return
    if directory.exists():
        raise UserError(f"{directory} holds a run already: --resume it, or give another --name")
    with fresh_directory(directory):
        if not config.data.prepared:
            prepare(config.data, directory / "data")
        for split in SPLITS:
            open_windows(data_directory(config), split, config.batch.length)
        options.write(config, file)


def _rank_meter(stage: Stage, config: Config, start: int, world: World) -> RankMeter | None:
    if stage.restarts is None or config.log.rank_sites == 0:
        return None
    file = config.directory / "first-weights.safetensors"
    weights = _followed(stage, config, merged=False)
    return RankMeter(file, weights, world, begins=start == stage.phase.start)


def _followed(stage: Stage, config: Config, *, merged: bool) -> dict[str, Tensor]:
    sites = dict(relora.low_rank_sites(stage.model))
    names = spread(list(sites), config.log.rank_sites)
    return {name: sites[name].merged() if merged else sites[name].weight for name in names}


class _Log:
    """Turns what happens into records, without waiting for the device at every step."""

    def __init__(self, config: Config, stage: Stage, metrics: Metrics, world: World) -> None:
        self.config = config
        self.stage = stage
        self.metrics = metrics
        self.world = world
        self.losses: list[Tensor] = []
        self.seconds = 0.0
        self.began = 0.0

    def begin(self) -> None:
        self.began = time.perf_counter()

    def step(self, step: int, loss: Tensor, norm: Tensor, rates: dict[str, float]) -> None:
        self.losses.append(loss)
        last = (step + 1) % self.config.log.every == 0 or step + 1 == self.stage.phase.stop
        mean = self.world.mean(torch.stack(self.losses).mean()) if last else 0.0
        self.seconds += time.perf_counter() - self.began
        if not last:
            return
        if not np.isfinite(mean):
            raise UserError(
                f"the loss is {mean} at step {step}: lower optim.lr or relora.lr_multiple, and "
                "resume from the last checkpoint under another name"
            )
        tokens = len(self.losses) * self.config.batch.sequences * self.config.batch.length
        self.metrics.write(
            "step",
            step,
            phase=self.stage.phase.name,
            loss=mean,
            gradient_norm=float(_whole(norm)),
            tokens_per_second=tokens / self.seconds,
            **{f"lr_{name}": rate for name, rate in rates.items()},
        )
        self.losses, self.seconds = [], 0.0

    def restart(self, step: int, meter: RankMeter | None) -> None:
        began = time.perf_counter()
        options = self.config.relora
        report = relora.restart_(
            self.stage.model,
            self.stage.optimizer,
            prune_ratio=options.prune_ratio,
            masks=options.masks,
        )
        seconds = time.perf_counter() - began
        norms = list(report.update_norms.values())
        assert self.stage.restarts is not None
        self.metrics.write(
            "restart",
            step,
            restart=self.stage.restarts.count(step - self.stage.phase.start),
            sites=report.sites,
            mean_update_norm=sum(norms) / len(norms),
            zeroed_fraction=report.zeroed_fraction,
            seconds=seconds,
            ranks=meter.measure(_followed(self.stage, self.config, merged=False)) if meter else {},
        )

    def evaluation(self, step: int, loss: float) -> None:
        self.metrics.write("evaluation", step, phase=self.stage.phase.name, held_out_loss=loss)
        if self.world.first:
            steps, name = self.config.steps, self.stage.phase.name
            tqdm.write(f"step {step:>6} of {steps}  {name:<10}  held-out loss {loss:.4f}")

    def final_ranks(self, step: int, meter: RankMeter) -> None:
        assert self.stage.restarts is not None
        ranks = meter.measure(_followed(self.stage, self.config, merged=True))
        last = step - 1 - self.stage.phase.start
        self.metrics.write("end", step, cycles=self.stage.restarts.count(last) + 1, ranks=ranks)


def _progress(steps: range, config: Config, phase: Phase, world: World) -> Iterator[int]:
    quiet = None if world.first else True  # None: only on a terminal
    bar = tqdm(total=config.steps, initial=steps.start, disable=quiet, desc=phase.name, unit="step")
    with bar:
        for step in steps:
            yield step
            bar.update()


def _whole(norm: Tensor) -> Tensor:
    full = getattr(norm, "full_tensor", None)
    return full() if full else norm


def _environment(config: Config, world: World) -> dict[str, object]:
    cuda = world.device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(world.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processes": world.size,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "seed": config.seed,
        "rank": config.relora.rank,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

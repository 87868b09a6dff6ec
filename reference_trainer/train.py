"""The training loop: Algorithm 1 of the ReLoRA paper, phase by phase."""

import contextlib
import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from reference_trainer import checkpoint
from reference_trainer.begin import (
    begun,
    check,
    check_same,
    fixed,
    goes_on,
    open_directory,
)
from reference_trainer.config import Config, Reduce
from reference_trainer.data import Batches, Windows, open_windows
from reference_trainer.environment import environment
from reference_trainer.errors import Stopped
from reference_trainer.evaluate import evaluate
from reference_trainer.export import export
from reference_trainer.feed import Feed
from reference_trainer.files import locked
from reference_trainer.interruption import Interruption
from reference_trainer.journal import Journal
from reference_trainer.metrics import Metrics
from reference_trainer.model import Llama
from reference_trainer.phases import phases
from reference_trainer.plan import plan
from reference_trainer.prepare import read_index
from reference_trainer.pretrained import shape_of
from reference_trainer.saving import Saver
from reference_trainer.stage import Stage, build_stage, fill_, save
from reference_trainer.terminal import log
from reference_trainer.world import World, open_world, world_size


@dataclass(frozen=True)
class Run:
    """What the phases of a run share.

    Args:
        config: the run.
        world: its processes.
        feed: of what is trained on, by step.
        held_out: what is evaluated on.
        metrics: where records go.
        saver: of checkpoints.
        interruption: what may ask it to stop.
    """

    config: Config
    world: World
    feed: Feed
    held_out: Windows
    metrics: Metrics
    saver: Saver
    interruption: Interruption


def train(config: Config, *, resume: bool = False, again: bool = False) -> None:
    """Run `config` to its end in `config.directory`, the merged model's export included.

    Args:
        config: the run.
        resume: go on from the newest complete checkpoint of a run that is there; otherwise the
            directory must not exist.
        again: whether a launcher has tried this before: a run that is there by now is resumed.

    Raises:
        UserError: if something given is wrong. A new run leaves nothing behind then.
    """
    resume = resume or (again and begun(config))
    check(config, processes=world_size(), resume=resume)
    with open_world(config.parallel) as world, contextlib.ExitStack() as held:
        world.on_first(lambda: open_directory(config, resume=resume))
        lock = locked(config.directory / "config.yaml")
        world.on_first(lambda: held.enter_context(lock))
        data, length = config.data_directory, config.batch.length
        shape = shape_of(config, read_index(data).vocab_size)
        held_out = open_windows(data, "held_out", length)
        windows = open_windows(data, "train", length)
        batches = Batches(windows, config.batch.sequences, config.seed)
        feed = Feed(batches, world, config.batch.micro_steps(world.size))

        newest = checkpoint.find(config.checkpoints, world)
        position = checkpoint.read_position(newest) if newest else None
        if position:
            world.on_first(lambda: check_same(config, position))
        step = position.step if position else 0
        writer = Metrics(
            config.directory,
            writes=world.first,
            tensorboard=config.log.tensorboard,
            since=(step, position.phase) if position else (0, ""),
        )
        keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
        saver = Saver(
            config.checkpoints, world, fixed=fixed(config), keep=keep, keep_every=keep_every
        )
        interruption = Interruption(config.checkpoint.stop_after)
        run = Run(config, world, feed, held_out, writer, saver, interruption)
        with writer, saver, interruption, feed:
            if world.first:
                for line in plan(config, processes=world.size, resume=resume):
                    log.info(line)
                if newest:
                    log.info(f"{'goes on':<12}from step {step}, from {newest}")
            known = {"processes": world.size, "seed": config.seed, "rank": config.relora.rank}
            writer.write("start", step, **environment(world.device), **known)
            for phase in phases(config):
                if step < phase.stop:
                    stage = build_stage(config, phase, shape, world)
                    step = fill_(stage, config, newest, world)
                    newest = train_stage(stage, step, run)
                    step = phase.stop
                    del stage  # its memory is the next phase's,
                    gc.collect()  # though FSDP2's hooks and the model refer to each other
        export(config, world)


def train_stage(stage: Stage, start: int, run: Run) -> Path:
    """Train `stage` from the run's step `start` to its phase's end; return the last checkpoint.

    A step without a finite loss and gradient, on whatever process, is skipped on all of them:
    weights, moments and adapters stay, the schedule and the data go on.

    Raises:
        SharedError: if too many steps in a row are skipped, a restart refuses, or a checkpoint
            cannot be written.
        Stopped: if the run is asked to stop.
    """
    config, world, saver, phase = run.config, run.world, run.saver, stage.phase
    journal = Journal(config, stage, run.metrics, world)
    latest, skipped = Path(), 0
    if start == phase.start:
        journal.evaluation(start, evaluate(stage.model, run.held_out, config, world))

    for step in journal.steps(start):
        if phase.restarts_at(step):
            try:
                report = stage.restart_(config.relora, world.patience)
            except ValueError as error:
                world.refuse(f"the restart at step {step} was refused: {error}")
            journal.restart(step, report)

        loss = forward_backward(stage.model, run.feed.at(step), world, config.parallel.reduce)
        norm = clip_grad_norm_(stage.parameters.values(), config.optim.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        broken, stop, save_now, unsaved = world.any(
            ~(loss + norm).isfinite(), *run.interruption.asked(), saver.failed
        )
        if unsaved:
            saver.wait()  # which raises what has happened
        skipped = skipped + 1 if broken else 0
        rates = stage.rates()
        stage.step(skip=broken)
        journal.step(step, loss, norm, rates, skipped=broken)

        done, last = step + 1, step + 1 == phase.stop
        if done % config.log.evaluate_every == 0 or last:
            journal.evaluation(done, evaluate(stage.model, run.held_out, config, world))
        given_up = skipped == config.optim.most_skips
        ends = last or given_up or stop
        if last:
            journal.end()
        if ends or save_now or done % config.checkpoint.every == 0:
            save(stage, done, saver, world, copied=not ends)
        if ends:
            latest = saver.wait()
        if given_up:
            world.refuse(
                f"{skipped} steps in a row, to step {step}, had no finite loss and gradient: "
                f"{latest} has the weights from before them; lower optim.lr or relora.lr_multiple"
            )
        if stop and done < config.steps:
            world.tell(f"stopped before step {done}: {goes_on(config)}")
            raise Stopped
    return latest


def forward_backward(model: Llama, parts: Tensor, world: World, reduce: Reduce = "step") -> Tensor:
    """Accumulate the gradient of the whole batch's mean loss; return this process's mean loss.

    Args:
        model: sharded.
        parts: this process's, of each micro-step: (micro_steps, sequences, length + 1).
        world: the processes.
        reduce: gradients, over the processes: in the last micro-step of the step, or in each.
    """
    total, micro_steps = torch.zeros((), device=world.device), len(parts)
    for index, part in enumerate(parts.to(world.device, non_blocking=True)):
        last = index == micro_steps - 1
        model.set_requires_gradient_sync(last or reduce == "micro-step")  # type: ignore[operator]
        loss = model(part[:, :-1], part[:, 1:]) / micro_steps
        loss.backward()
        total += loss.detach()
    return total

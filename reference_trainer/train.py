"""The training loop: Algorithm 1 of the ReLoRA paper, in two phases.

`build_state` freezes W and adds A and B (`phase_model.py`). `restart_` merges, redraws A, zeroes B
and prunes the moments, before the step whose learning rate is 0. The jagged rate is the state's
`schedule` (`train_state.py`), and its clock is the phase's (`phases.py`).
"""

import gc
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from reference_trainer.config import Config, Reduce
from reference_trainer.distributed import World
from reference_trainer.evaluate import evaluate
from reference_trainer.export import export, write_export
from reference_trainer.logging.memory import PeakMemory
from reference_trainer.logging.progress import Progress
from reference_trainer.model.llama import Llama
from reference_trainer.run import Run, open_run, write_start
from reference_trainer.train_state import TrainState, build_state, fill_, save
from relora_core import restart_


def train(config: Config, *, resume: bool = False, again: bool = False) -> None:
    """Run `config` to its end in `config.directory`, including the export of the merged model.

    Args:
        config: the run's configuration.
        resume: whether to continue an existing run from its newest complete checkpoint; if not, the
            directory must not exist.
        again: whether a launcher has started this job before; a run that exists is then resumed.

    Raises:
        UserError: if something in the input is wrong. A new run then leaves nothing behind.
    """
    with open_run(config, resume=resume, again=again) as run:
        state, step, newest = None, run.step, run.newest
        with run.metrics, run.saver, run.interruption, run.feed:
            write_start(run)
            for phase in run.phases:
                if step < phase.stop:
                    state = None  # frees its memory for the next phase;
                    gc.collect()  # FSDP2's hooks and the model form a reference cycle
                    state = build_state(config, phase, run.shape, run.world)
                    step = fill_(state, config, newest, run.world)
                    newest = train_phase(state, step, run)
                    step = phase.stop
        if state is None:  # the run was done already
            export(config, run.world)
        else:
            write_export(state.model, config, run.index, run.world)


def train_phase(state: TrainState, start: int, run: Run) -> Path:
    """Train from the run's step `start` to the end of a phase; return its last checkpoint.

    A step with a non-finite loss or gradient on any process is skipped on all processes: weights,
    moments and adapters do not change, while the schedule and the data advance.

    Raises:
        SharedError: if too many steps in a row are skipped, a restart raises an error, or a
            checkpoint cannot be written.
        Stopped: if the run is asked to stop.
    """
    config, world, phase = run.config, run.world, state.phase
    model, optimizer, schedule = state.model, state.optimizer, state.schedule
    progress = Progress(config, phase, run.metrics, shown=world.first)
    peak, latest, skipped = PeakMemory(world.device), Path(), 0
    if start == phase.start:
        progress.evaluation(start, evaluate(model, run.held_out, config, world))

    for step in progress.steps(start):
        if phase.restarts_at(step):
            state.keep_updates_()  # for the ranks on record
            try:
                report = restart_(
                    model,
                    optimizer,
                    prune_ratio=config.relora.prune_ratio,
                    masks=config.relora.masks,
                    timeout=world.patience,
                )
            except ValueError as error:
                world.refuse(f"the restart at step {step} was refused: {error}")
            progress.restart(step, report, state.rates(), state.measured())

        loss = forward_backward(model, run.feed.at(step), world, config.parallel.reduce)
        norm = clip_grad_norm_(state.parameters.values(), config.optim.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        broken, stop, save_now, save_failed = world.any(
            ~(loss + norm).isfinite(), *run.interruption.asked(), run.saver.failed
        )
        if broken:
            optimizer.zero_grad()  # the step then changes nothing, and the schedule goes on
        rates = state.rates()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        if save_failed:
            run.saver.wait()  # raises the error of the failed save
        skipped = skipped + 1 if broken else 0
        progress.step(step, loss, norm, skipped=broken)
        if (mean := progress.due(step)) is not None:
            progress.record(step, world.mean(mean), rates, world.largest(peak.bytes()))
        done, last = step + 1, step + 1 == phase.stop
        if done % config.log.evaluate_every == 0 or last:
            progress.evaluation(done, evaluate(model, run.held_out, config, world))
        if last:
            progress.end(state.measured())
        given_up = skipped == config.optim.most_skips
        ends = last or given_up or stop
        if ends or save_now or done % config.checkpoint.every == 0:
            save(state, done, run.saver, world, copied=not ends)
        if ends:
            latest = run.saver.wait()
        if given_up:
            world.refuse(
                f"{skipped} steps in a row, to step {step}, had a non-finite loss or gradient: "
                f"{latest} has the weights from before them; lower optim.lr or relora.lr_multiple"
            )
        if stop and done < config.steps:
            run.stop(done)
    return latest


def forward_backward(model: Llama, parts: Tensor, world: World, reduce: Reduce = "step") -> Tensor:
    """Accumulate the gradient of the whole batch's mean loss; return this process's mean loss.

    Args:
        model: the sharded model.
        parts: this process's part of each micro-step: (micro_steps, sequences, length + 1).
        world: the processes.
        reduce: when to reduce gradients over the processes: in the step's last micro-step ("step"),
            or in each ("micro-step").
    """
    total, micro_steps = torch.zeros((), device=world.device), len(parts)
    for index, part in enumerate(parts.to(world.device, non_blocking=True)):
        last = index == micro_steps - 1
        model.set_requires_gradient_sync(last or reduce == "micro-step")  # type: ignore[operator]
        loss = model(part[:, :-1], part[:, 1:]) / micro_steps
        loss.backward()
        total += loss.detach()
    return total

"""A run in progress: its data, records and checkpoints, each opened once."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from reference_trainer.checkpoint.find import find_checkpoint
from reference_trainer.checkpoint.format import read_position
from reference_trainer.checkpoint.save import Saver
from reference_trainer.config import Config
from reference_trainer.data.batches import Batches
from reference_trainer.data.feed import Feed
from reference_trainer.data.index import Index, read_index
from reference_trainer.data.windows import Windows, open_windows
from reference_trainer.distributed import World, open_world, world_size
from reference_trainer.environment import environment
from reference_trainer.errors import Stopped
from reference_trainer.files import locked
from reference_trainer.logging.console import log
from reference_trainer.logging.metrics import Metrics
from reference_trainer.model.llama import LlamaShape
from reference_trainer.phases import Phase
from reference_trainer.preflight import preflight
from reference_trainer.run_directory import begun, check_same, fixed, goes_on, open_directory
from reference_trainer.run_summary import summary_of
from reference_trainer.signals import Interruption


@dataclass(frozen=True)
class Run:
    """A run that has been opened, on each of its processes.

    Args:
        config: the run's options.
        world: its processes.
        index: the index of its tokens.
        shape: the shape of its model.
        phases: its phases, in order.
        feed: the training batches, by step.
        held_out: the windows for evaluation.
        metrics: the writer of records.
        saver: the writer of checkpoints.
        interruption: the requests to stop or to save.
        newest: the checkpoint that the run continues from; None for a new run.
        step: the next step.
    """

    config: Config
    world: World
    index: Index
    shape: LlamaShape
    phases: tuple[Phase, ...]
    feed: Feed
    held_out: Windows
    metrics: Metrics
    saver: Saver
    interruption: Interruption
    newest: Path | None = None
    step: int = 0

    def stop(self, step: int) -> NoReturn:
        """Say before which step the run stops, and how it is resumed; raise Stopped."""
        self.world.tell(f"stopped before step {step}: {goes_on(self.config)}")
        raise Stopped


@contextmanager
def open_run(config: Config, *, resume: bool, again: bool) -> Iterator[Run]:
    """Open the run of `config`; its directory is made or found, and locked until the block ends.

    Args:
        config: the run's options.
        resume: whether to continue an existing run from its newest complete checkpoint; if not, the
            directory must not exist.
        again: whether a launcher has started this job before; a run that exists is then resumed.

    Raises:
        UserError: if something in the input is wrong. A new run then leaves nothing behind.
    """
    resume = resume or (again and begun(config))
    plan = preflight(config, processes=world_size(), resume=resume)
    with open_world(config.parallel) as world, contextlib.ExitStack() as held:
        world.on_first(lambda: open_directory(config, plan.index, resume=resume))
        lock = locked(config.directory / "config.yaml")
        world.on_first(lambda: held.enter_context(lock))
        data, length = config.data_directory, config.batch.length
        index = plan.index or read_index(data)
        windows = open_windows(data, index, "train", length)
        newest = find_checkpoint(config.checkpoints, world)
        position = read_position(newest) if newest else None
        if position:
            world.on_first(lambda: check_same(config, index, position))
        step = position.step if position else 0
        run = Run(
            config,
            world,
            index,
            plan.shape,
            tuple(plan.phases),
            Feed(
                Batches(windows, config.batch.sequences, config.seed),
                world,
                config.batch.micro_steps(world.size),
            ),
            open_windows(data, index, "held_out", length),
            Metrics(
                config.directory,
                writes=world.first,
                tensorboard=config.log.tensorboard,
                since=(step, position.phase) if position else (0, ""),
            ),
            Saver(
                config.checkpoints,
                world,
                fixed=fixed(config, index),
                keep=config.checkpoint.keep,
                keep_every=config.checkpoint.keep_every,
            ),
            Interruption(config.checkpoint.stop_after),
            newest,
            step,
        )
        if world.first:
            for line in summary_of(plan):
                log.info(line)
            if newest:
                log.info(f"{'continues':<12}from step {step}, from {newest}")
        yield run


def write_start(run: Run) -> None:
    """Record the step at which the run starts, and its hardware and versions."""
    run.metrics.write(
        {
            "event": "start",
            "step": run.step,
            **environment(run.world.device),
            "processes": run.world.size,
            "seed": run.config.seed,
            "rank": run.config.relora.rank,
        }
    )

"""A run under way: its data, records and checkpoints, each resolved once."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from reference_trainer import checkpoint
from reference_trainer.begin import begun, check, check_same, fixed, goes_on, open_directory
from reference_trainer.config import Config
from reference_trainer.data import Batches, Windows, open_windows
from reference_trainer.environment import environment
from reference_trainer.errors import Stopped
from reference_trainer.feed import Feed
from reference_trainer.files import locked
from reference_trainer.interruption import Interruption
from reference_trainer.metrics import Metrics
from reference_trainer.model import LlamaShape
from reference_trainer.plan import plan
from reference_trainer.prepare import read_index
from reference_trainer.pretrained import shape_of
from reference_trainer.saving import Saver
from reference_trainer.terminal import log
from reference_trainer.world import World, open_world, world_size


@dataclass(frozen=True)
class Run:
    """A run that has been opened, on each of its processes.

    Args:
        config: its options.
        world: its processes.
        shape: of its model.
        feed: of what is trained on, by step.
        held_out: what is evaluated on.
        metrics: where records go.
        saver: of checkpoints.
        interruption: what may ask it to stop.
        newest: the checkpoint that it goes on from; None at its beginning.
        step: the next one.
    """

    config: Config
    world: World
    shape: LlamaShape
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
    """Give the run of `config`, its directory made or found, and locked until the end.

    Args:
        config: its options.
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
        batches = Batches(open_windows(data, "train", length), config.batch.sequences, config.seed)
        newest = checkpoint.find(config.checkpoints, world)
        position = checkpoint.read_position(newest) if newest else None
        if position:
            world.on_first(lambda: check_same(config, position))
        step = position.step if position else 0
        run = Run(
            config,
            world,
            shape_of(config, read_index(data).vocab_size),
            Feed(batches, world, config.batch.micro_steps(world.size)),
            open_windows(data, "held_out", length),
            Metrics(
                config.directory,
                writes=world.first,
                tensorboard=config.log.tensorboard,
                since=(step, position.phase) if position else (0, ""),
            ),
            Saver(
                config.checkpoints,
                world,
                fixed=fixed(config),
                keep=config.checkpoint.keep,
                keep_every=config.checkpoint.keep_every,
            ),
            Interruption(config.checkpoint.stop_after),
            newest,
            step,
        )
        if world.first:
            for line in plan(config, processes=world.size, resume=resume):
                log.info(line)
            if newest:
                log.info(f"{'goes on':<12}from step {step}, from {newest}")
        yield run


def write_start(run: Run) -> None:
    """Record where the run starts, and on what."""
    known = {"seed": run.config.seed, "rank": run.config.relora.rank}
    hardware = environment(run.world.device)
    run.metrics.write("start", run.step, **hardware, processes=run.world.size, **known)

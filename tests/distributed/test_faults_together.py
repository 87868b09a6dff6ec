"""All processes decide together on a fault of one: to skip the step, or to stop the run."""

import os
import signal

import numpy as np
import pytest
import torch

import relora_core as relora
from reference_trainer import train
from reference_trainer.checkpoint.find import find_checkpoint
from reference_trainer.checkpoint.format import read_position
from reference_trainer.checkpoint.save import Saver
from reference_trainer.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    LogConfig,
    ModelConfig,
    ReLoRAConfig,
)
from reference_trainer.data.batches import Batches
from reference_trainer.data.feed import Feed
from reference_trainer.data.windows import Windows
from reference_trainer.distributed import lay_world
from reference_trainer.errors import Stopped
from reference_trainer.logging.metrics import Metrics
from reference_trainer.phases import phases
from reference_trainer.signals import Interruption
from reference_trainer.train_state import build_state, fill_
from tests.distributed.processes import full, on_processes

STEPS, LENGTH, VOCAB, BROKEN, STOPPED = 12, 16, 40, 5, 7


def run(rank, world_size, directory, *, stops=False):
    """Train on all processes; the last one's gradient is NaN at one step, or it hears SIGTERM."""
    config = Config(
        runs=str(directory),
        steps=STEPS,
        model=ModelConfig(hidden_size=20, intermediate_size=26, layers=1, heads=2),
        batch=BatchConfig(sequences=4, length=LENGTH, micro=4),
        relora=ReLoRAConfig(warm_start=0, rank=5, every=4, warmup=2),
        log=LogConfig(evaluate_sequences=4, rank_sites=0),
        checkpoint=CheckpointConfig(every=100),
    )
    world = lay_world(config.parallel, torch.device("cpu"))
    (phase,) = phases(config)
    state = build_state(config, phase, config.model.shape(VOCAB), world)
    fill_(state, config, None, world)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 40 * LENGTH + 1).astype(np.uint16)
    windows = Windows((tokens,), LENGTH)
    batches = Batches(windows, config.batch.sequences, config.seed)
    config.checkpoints.mkdir(parents=True, exist_ok=True)
    saver = Saver(config.checkpoints, world, fixed={}, keep=2)
    sound, calls = train.forward_backward, []

    def spoilt(model, batch, *others):
        loss = sound(model, batch, *others)
        if rank == world_size - 1 and len(calls) == BROKEN:
            next(p for p in model.parameters() if p.grad is not None).grad.to_local().fill_(np.nan)
        if stops and rank == world_size - 1 and len(calls) == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(None)
        return loss

    train.forward_backward = spoilt
    try:
        metrics = Metrics(config.directory, writes=False)
        feed = Feed(batches, world, config.batch.micro_steps(world_size))
        with Interruption(None) as interruption, saver, feed:
            run = train.Run(
                config,
                world,
                None,  # of no directory
                state.model.shape,
                (state.phase,),
                feed,
                windows,
                metrics,
                saver,
                interruption,
            )
            train.train_phase(state, 0, run)
        assert not stops
    except Stopped:
        assert stops
    finally:
        train.forward_backward = sound
    result = {n: full(t) for n, t in relora.merged_state_dict(state.model).items()}
    newest = find_checkpoint(config.checkpoints, world)
    result["saved"] = torch.tensor(read_position(newest).step)
    result["steps"] = torch.tensor(len(calls))
    return result


def several(rank, world_size, directory, stops):
    return run(rank, world_size, directory, stops=stops)


@pytest.mark.parametrize("stops", [False, True], ids=["skipped", "stopped"])
def test_one_process_is_enough_for_all(tmp_path, stops):
    (expected,) = on_processes(several, 1, tmp_path / "one", str(tmp_path / "a"), stops)
    end = STOPPED + 1 if stops else STEPS
    for result in on_processes(several, 2, tmp_path / "two", str(tmp_path / "b"), stops):
        assert result["steps"].item() == result["saved"].item() == end
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
            assert tensor.isfinite().all()

"""The cost of checkpoints: steps while a checkpoint is written, against steps without one."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from reference_trainer.bench.measure import Timed, interleaved, now
from reference_trainer.checkpoint.save import Saver
from reference_trainer.config import (
    BatchConfig,
    Config,
    ModelConfig,
    OptimConfig,
    ReLoRAConfig,
)
from reference_trainer.distributed import World
from reference_trainer.model.llama import LlamaShape
from reference_trainer.phases import phases
from reference_trainer.train import forward_backward
from reference_trainer.train_state import build_state, fill_, save

_STEPS = 10**6


def measure_checkpoints(
    shape: LlamaShape, world: World, directory: Path, *, every: int, repeats: int, **batch: int
) -> list[dict[str, Any]]:
    """Time `every` full-rank steps, alone and while a checkpoint is written.

    The steps use the trainer's own state, step and saver. They are at full rank, which has the
    largest checkpoint.

    Args:
        shape: shape of the model.
        world: world of one process.
        directory: directory on the disk to write to.
        every: number of steps from one checkpoint to the next.
        repeats: number of timed rounds.
        batch: `sequences` in a step and `length` of each in tokens.
    """
    config = Config(
        steps=_STEPS,
        model=ModelConfig(preset="9m"),  # the shape is given below
        batch=BatchConfig(micro=batch["sequences"], **batch),
        optim=OptimConfig(lr=1e-6),
        relora=ReLoRAConfig(warm_start=_STEPS),
    )
    (phase,) = phases(config)
    stage = build_state(config, phase, shape, world)
    step = fill_(stage, config, None, world)
    generator = torch.Generator().manual_seed(config.seed)
    size = (1, batch["sequences"], batch["length"] + 1)
    tokens = torch.randint(0, shape.vocab_size, size, generator=generator)
    with (
        tempfile.TemporaryDirectory(dir=directory) as place,
        Saver(Path(place), world, fixed={}, keep=2) as saver,
    ):

        def steps(*, saves: bool) -> dict[str, float]:
            nonlocal step
            began = now(world.device)
            if saves:
                save(stage, step, saver, world, copied=True)
            for _ in range(every):
                forward_backward(stage.model, tokens, world)
                clip_grad_norm_(stage.parameters.values(), config.optim.clip)
                stage.optimizer.step()
                stage.schedule.step()
                stage.optimizer.zero_grad()
                step += 1
            if saves:
                saver.wait()
            return {"step": now(world.device) - began}

        timed: dict[str, Timed] = {
            "no checkpoint": lambda: steps(saves=False),
            "a checkpoint": lambda: steps(saves=True),
        }
        seconds = interleaved(timed, repeats, "checkpoints")
        written = sum(file.stat().st_size for file in saver.wait().iterdir())
    return [
        {
            "event": "arm",
            "subject": f"{every} steps, {written / 1e6:,.0f} MB a checkpoint",
            "arm": name,
            "step_seconds": [parts["step"] for parts in runs],
        }
        for name, runs in seconds.items()
    ]

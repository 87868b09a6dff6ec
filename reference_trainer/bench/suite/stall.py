"""Stage 7: the time for which a checkpoint stalls training."""

import tempfile
from pathlib import Path

import torch

from reference_trainer.bench.layouts import FULL, laid_out
from reference_trainer.bench.measure import now
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes
from reference_trainer.bench.workloads import draw_weights_
from reference_trainer.checkpoint.save import Saver
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import open_world
from reference_trainer.train import forward_backward
from reference_trainer.train_state import save


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Time the copying and writing of two full-rank checkpoints, the largest kind."""
    parallel = ParallelConfig("cuda" if device.type == "cuda" else "cpu", "bf16")
    with tempfile.TemporaryDirectory() as directory, open_world(parallel) as world:
        step = sizes.step(FULL, 1)
        stage = laid_out(step, world)
        draw_weights_(stage.model, step.shape)
        forward_backward(stage.model, step.parts(), world)
        stage.optimizer.step()
        with Saver(Path(directory), world, fixed={}, keep=2) as saver:
            for number, which in enumerate(("first", "second")):
                began = now(device)
                save(stage, number + 1, saver, world, copied=True)
                report.measured(f"checkpoint, the {which}: copied", now(device) - began)
                written = saver.wait()
                report.measured(f"checkpoint, the {which}: on the disk", now(device) - began)
            size = sum(file.stat().st_size for file in written.iterdir())
        report.measured("checkpoint: size", size, "bytes")

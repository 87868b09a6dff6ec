"""The processes of a run wait for each other, and say who did not come."""

import time
from pathlib import Path

import pytest
import torch

import relora_core as relora
from reference_trainer.config import ParallelConfig
from reference_trainer.errors import UserError
from reference_trainer.world import lay_world, open_world
from tests.distributed.processes import on_processes


def waits(rank, world_size, directory):
    """The last process comes late, and leaves a note first."""
    world = lay_world(ParallelConfig(), torch.device("cpu"))
    note = Path(directory) / "note"
    if rank == world_size - 1:
        time.sleep(1)
        note.touch()
    world.barrier()
    seen = note.exists()
    return {
        "seen": torch.tensor(seen),
        "sum": torch.tensor(world.sum(torch.tensor(rank + 1.0))),
        "mean": torch.tensor(world.mean(torch.tensor(rank + 1.0))),
    }


def test_nobody_leaves_a_barrier_before_all_have_come(tmp_path):
    for result in on_processes(waits, 3, tmp_path / "ranks", str(tmp_path)):
        assert result["seen"]
        assert result["sum"] == 6
        assert result["mean"] == 2


def test_to_be_out_of_step_is_an_error_in_one_line_that_says_how_to_go_on():
    fault = "restart_ number 2: rank 1 did not come"
    with pytest.raises(UserError, match=f"{fault}: `train --resume`"), open_world(ParallelConfig()):
        raise relora.OutOfStepError(fault)

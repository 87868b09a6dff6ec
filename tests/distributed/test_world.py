"""The processes of a run wait for each other, and name any that is missing."""

import time
from pathlib import Path

import pytest
import torch

import relora_core as relora
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import choose_device, lay_world, open_world
from reference_trainer.errors import UserError
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


def groups(rank, world_size):
    world = lay_world(ParallelConfig(replicas=2, timeout=3), torch.device("cpu"))
    every = [world.mesh.get_group(name) for name in ("replicas", "shards")]
    patience = [one._get_backend(torch.device("cpu")).options._timeout for one in every]
    return {"minutes": torch.tensor([one.total_seconds() / 60 for one in patience])}


def test_the_groups_of_replicas_and_shards_wait_as_long_as_is_said(tmp_path):
    for result in on_processes(groups, 2, tmp_path / "ranks"):
        assert result["minutes"].tolist() == [3, 3]


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="CUDA device 1, but torch sees 1 devices"):
        choose_device(ParallelConfig())
    assert choose_device(ParallelConfig(device="cpu")).type == "cpu"


def test_to_be_out_of_step_is_an_error_in_one_line_that_says_how_to_go_on():
    fault = "restart_ number 2: rank 1 did not come"
    with pytest.raises(UserError, match=f"{fault}: `train --resume`"), open_world(ParallelConfig()):
        raise relora.OutOfStepError(fault)

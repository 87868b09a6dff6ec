"""A process that skips a restart or makes another one causes an error that names it, not a hang."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import relora_core as relora
from tests.distributed.processes import on_processes

SHORT, LONG = timedelta(seconds=3), timedelta(seconds=60)


def shared(world_size, wrapper):
    model = relora.add_low_rank_(nn.Sequential(nn.Linear(6, 5)), "0", rank=2)
    if wrapper == "fsdp":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained)


def number(model):
    return next(iter(relora.low_rank_sites(model)))[1].restart


def skips(rank, world_size, wrapper):
    model, optimizer = shared(world_size, wrapper)
    relora.restart_(model, optimizer, timeout=LONG)
    if rank != 1:
        with pytest.raises(
            RuntimeError, match=r"number 2.*: 1 of .*\(process rank 1\) did not call it within 3 s"
        ):
            relora.restart_(model, optimizer, timeout=SHORT)
    return {"number": torch.tensor(number(model))}


@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
def test_who_skips_a_restart_is_named_and_nothing_is_changed(tmp_path, wrapper):
    results = on_processes(skips, 3, tmp_path / "ranks", wrapper)
    assert [result["number"].item() for result in results] == [1, 1, 1]


def comes_late(rank, world_size, wrapper):
    """The others give up before rank 1 is there, which must find that out, and then all agree."""
    model, optimizer = shared(world_size, wrapper)
    if rank == 1:
        time.sleep(6)
    with pytest.raises(RuntimeError, match=r"1 of .*\(process rank 1\) did not call it within 3 s"):
        relora.restart_(model, optimizer, timeout=SHORT)
    before = number(model)
    relora.restart_(model, optimizer, timeout=LONG)
    return {"number": torch.tensor([before, number(model)])}


@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
def test_who_comes_too_late_restarts_no_more_than_the_others(tmp_path, wrapper):
    for result in on_processes(comes_late, 3, tmp_path / "ranks", wrapper):
        assert result["number"].tolist() == [0, 1]


def other_model(rank, world_size):
    one, two = (shared(world_size, "ddp") for _ in range(2))
    relora.reinit_(two[0])
    model, optimizer = one if rank == 0 else two
    with pytest.raises(RuntimeError, match=r"process rank 0 calls .* but process rank 1 calls"):
        relora.restart_(model, optimizer, timeout=LONG)
    return {"number": torch.tensor([number(one[0]), number(two[0])])}


def test_who_restarts_another_model_is_named(tmp_path):
    for result in on_processes(other_model, 2, tmp_path / "ranks"):
        assert result["number"].tolist() == [0, 1]


def disagrees(rank, world_size):
    model, optimizer = shared(world_size, "fsdp")
    with pytest.raises(RuntimeError, match=r"rank 0 .*ratio=0.9,.* rank 2 .*ratio=0.5,"):
        relora.restart_(model, optimizer, prune_ratio=0.5 if rank == 2 else 0.9, timeout=LONG)
    before = number(model)
    for _ in range(3):  # and it works again once they agree
        relora.restart_(model, optimizer, timeout=LONG)
    return {"number": torch.tensor([before, number(model)])}


def test_who_restarts_otherwise_is_named_on_every_process(tmp_path):
    for result in on_processes(disagrees, 3, tmp_path / "ranks"):
        assert result["number"].tolist() == [0, 3]


def alone(rank, world_size):
    model, optimizer = shared(world_size, None)
    if rank == 0:
        relora.restart_(model, optimizer, timeout=SHORT)
    dist.barrier()
    return {"number": torch.tensor(number(model))}


def test_a_model_of_one_process_waits_for_nobody(tmp_path):
    results = on_processes(alone, 2, tmp_path / "ranks")
    assert [result["number"].item() for result in results] == [1, 0]


def refuses_alone(rank, world_size):
    """ZeRO keeps a parameter's moments on one process, so that only it sees a NaN in them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns as it is imported

    model = relora.add_low_rank_(nn.Sequential(nn.Linear(6, 5)), "0", rank=2)
    model = DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-2)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    moments = [state["exp_avg"] for state in optimizer.optim.state.values()]
    if rank == 0:
        moments[0].view(-1)[0] = torch.nan
    with pytest.raises(
        relora.OutOfStepError, match=r"(?s)rank 0 .*which raises an error: .*moments hold"
    ):
        relora.restart_(model, optimizer, timeout=LONG)
    before = number(model)
    if rank == 0:
        moments[0].view(-1)[0] = 0.0
    relora.restart_(model, optimizer, timeout=LONG)
    return {"number": torch.tensor([before, number(model), len(moments)])}


def test_what_one_process_refuses_no_process_does(tmp_path):
    results = on_processes(refuses_alone, 2, tmp_path / "ranks")
    before, after, moments = torch.stack([result["number"] for result in results]).T.tolist()
    assert before == [0, 0]
    assert after == [1, 1]
    assert sum(moments) == 3  # a bias, A and B: each on one process


def all_refuse(rank, world_size):
    """Half precision, and on one process an empty part of W."""
    model = relora.add_low_rank_(nn.Sequential(nn.Linear(6, 1, bias=False)).half(), "0", rank=1)
    model = fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    relora.restart_(model, optimizer, timeout=LONG)
    site = next(iter(relora.low_rank_sites(model)))[1]
    held = site.weight.to_local().numel()
    with torch.no_grad():
        site.weight.to_local().fill_(60000.0)
        site.lora_B.to_local().fill_(3000.0)
        site.lora_A.to_local().fill_(1.0)  # so that W alone decides
    with pytest.raises(ValueError, match="may overflow"):
        relora.restart_(model, optimizer, timeout=LONG)
    return {"number": torch.tensor([number(model), held])}


def test_what_all_refuse_is_refused_for_its_own_reason(tmp_path):
    results = on_processes(all_refuse, 2, tmp_path / "ranks")
    assert [result["number"].tolist() for result in results] == [[1, 6], [1, 0]]

"""The spectrum of what restarts merged equals one process's, however the model is sharded."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import relora_core as relora
from relora_core.distributed import dtensor
from relora_core.distributed.sharding import copy_from_full_
from tests.distributed.processes import assert_same_run, full, on_processes

RESTARTS, RANK = 4, 3  # more directions than a side of `up` and `down` has
WIDTH = 12 if dtensor._MISPLACES else 10  # 10 is uneven over 3, 4 and 2 x 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.up = nn.Linear(7, WIDTH)
        self.down = nn.Linear(WIDTH, 7)
        self.mix = nn.Conv1d(7, 5, 3)


def follow(wrap, low_rank_first=True):
    """Return every site's singular values, and what is kept, multiplied out."""
    model = Net()
    if low_rank_first:
        relora.add_low_rank_(model, "*", rank=RANK, alpha=6.0)
    model = wrap(model)
    optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
    spectra = relora.UpdateSpectra(model)
    draws = torch.Generator().manual_seed(5)
    result = {}

    def train(cycle):
        for _, site in relora.low_rank_sites(model):
            for factor in (site.lora_A, site.lora_B):
                copy_from_full_(factor, torch.randn(factor.shape, generator=draws))
        for name, spectrum in spectra.measure().items():
            result[f"values/{cycle}/{name}"] = spectrum.values

    for cycle in range(RESTARTS):
        train(cycle)
        spectra.keep_()
        relora.restart_(model, optimizer)
    train(RESTARTS)
    state = {name: full(tensor) for name, tensor in spectra.state_dict().items()}
    again = relora.UpdateSpectra(model)
    for source in (state, spectra.state_dict()):
        again.load_state_dict(source)
        for name, spectrum in again.measure().items():
            assert torch.equal(spectrum.values, result[f"values/{RESTARTS}/{name}"])
    for name, _ in relora.low_rank_sites(model):
        result[f"kept/{name}"] = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"].flatten(1)
    parts = [t.to_local() for t in spectra.state_dict().values() if isinstance(t, DTensor)]
    result["held"] = torch.tensor(sum(part.numel() for part in parts))
    return result


def under_fsdp(rank, world_size, sizes):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])

    def wrap(model):
        fully_shard(model.up, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return follow(wrap)


def over_whole_bases(rank, world_size):
    def wrap(model):
        bases = {site.weight for _, site in relora.low_rank_sites(model)}
        return fully_shard(model, ignored_params=bases)

    return follow(wrap)


def under_ddp(rank, world_size):
    return follow(DistributedDataParallel)


def split(rank, world_size, sizes):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("shards", "columns")[-len(sizes) :])
    plan = {"embed": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}

    def wrap(model):
        relora.add_low_rank_(
            parallelize_module(model, mesh["columns"], plan), "*", rank=RANK, alpha=6.0
        )
        return fully_shard(model, mesh=mesh["shards"]) if len(sizes) > 1 else model

    return follow(wrap, low_rank_first=False)


def compare(results):
    expected = follow(lambda model: model)
    expected.pop("held")
    held = [int(result.pop("held")) for result in results]
    assert_same_run(results, expected, exact=())
    return held


def kept_in_all():
    shapes = ((11, 7), (WIDTH, 7), (7, WIDTH), (5, 21))
    return sum((m + n) * min(m, n, RANK * RESTARTS) for m, n in shapes)


@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 2)], ids=["2", "3", "2 replicas of 2 shards"])
def test_it_is_the_same_under_fsdp_and_each_process_keeps_its_share(tmp_path, sizes):
    held = compare(on_processes(under_fsdp, math.prod(sizes), tmp_path / "ranks", sizes))
    replicas = sizes[0] if len(sizes) > 1 else 1
    assert sum(held) == replicas * kept_in_all()
    assert max(held) < 1.7 * sum(held) / len(held)


@pytest.mark.parametrize("world_size", [2, 3])
def test_it_is_the_same_over_whole_bases(tmp_path, world_size):
    compare(on_processes(over_whole_bases, world_size, tmp_path / "ranks"))


def test_it_is_the_same_under_ddp(tmp_path):
    compare(on_processes(under_ddp, 2, tmp_path / "ranks"))


@pytest.mark.parametrize("sizes", [(2,), (2, 2)], ids=["2", "under FSDP2, 2 x 2"])
def test_it_is_the_same_under_tensor_parallelism(tmp_path, sizes):
    compare(on_processes(split, math.prod(sizes), tmp_path / "ranks", sizes))


def skipped(rank, world_size):
    model = relora.add_low_rank_(Net(), "*", rank=RANK)
    spectra = relora.UpdateSpectra(fully_shard(model), timeout=timedelta(seconds=3))
    said = ""
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"rank 1\) did not call it within 3 s") as caught:
            spectra.keep_()
        said = str(caught.value)
        assert not any("lora" in name for name in spectra.state_dict())
    dist.barrier()
    return {"said": torch.tensor(len(said))}


def test_a_process_that_skips_it_is_named(tmp_path):
    first, _ = on_processes(skipped, 2, tmp_path / "ranks")
    assert first["said"] > 0

"""A reset over several processes does what it does on one: sharded states, and ZeRO's."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import relora_core as relora
from tests.core.optim.optimizers import ADAM, OPTIMIZERS
from tests.distributed.processes import full, on_processes
from tests.reference import dropped, mask_by_sorting

SHAPES = ((10, 7), (1, 5), (9,))  # over 2 or 3 processes: uneven shards, and empty ones
SHARDED = ("AdamW amsgrad", "NAdam", "RMSprop centered", "SGD momentum", "Adamax")
RESETS = {
    "magnitude": {"prune_ratio": 0.7},
    "independent": {"prune_ratio": 0.7, "masks": "independent"},
    "random": {"prune_ratio": 0.7, "rule": "random", "seed": 5},
    "random and independent": {"prune_ratio": 0.7, "rule": "random", "masks": "independent"},
    "full": {"prune_ratio": 1.0},
}


def gradient(index, step, shape):
    generator = torch.Generator().manual_seed(100 * index + step)
    return torch.randn(shape, generator=generator).mul(2).round().div(2)  # with ties


def whole_parameters(shapes=SHAPES):
    return [gradient(index, 99, shape) for index, shape in enumerate(shapes)]


def after_resets(place):
    """Return the moments and parameters of every optimizer after every kind of reset."""
    result = {}
    for name in SHARDED:
        row = OPTIMIZERS[name]
        make = getattr(torch.optim, row.path.rpartition(".")[2])
        for kind, options in RESETS.items():
            params = [nn.Parameter(place(whole)) for whole in whole_parameters()]
            optimizer = make(params, lr=1e-2, **row.options)
            for step in range(3):
                for index, p in enumerate(params):
                    p.grad = place(gradient(index, step, p.shape))
                optimizer.step()
            report = relora.reset_optimizer_(optimizer, params, **options)
            key = f"{name}/{kind}"
            result[f"{key}/zeroed"] = torch.tensor([report.zeroed, report.entries])
            for index, p in enumerate(params):
                for moment in row.moments:
                    kept = full(optimizer.state[p][moment])
                    result[f"{key}/{index}/{moment}"] = kept.detach().clone()
    return result


def over_shards(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    return after_resets(lambda whole: distribute_tensor(whole.clone(), mesh, [Shard(0)]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_kind_of_reset_of_sharded_moments_is_that_of_whole_ones(tmp_path, world_size):
    expected = after_resets(torch.clone)
    for result in on_processes(over_shards, world_size, tmp_path / "ranks"):
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(result[name], tensor), name


def eight_bits(rank, world_size):
    torch.compiler.set_stance("force_eager")
    from torchao.optim import AdamW8bit

    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.randn(128, 80, generator=torch.Generator().manual_seed(1))
    p = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = AdamW8bit([p])
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        p.grad = distribute_tensor(torch.randn(128, 80, generator=generator), mesh, [Shard(0)])
        optimizer.step()

    def values(key):
        moment = optimizer.state[p][key]
        part = moment.to_local().dequantize()
        return DTensor.from_local(part, mesh, [Shard(0)], shape=p.shape, stride=p.stride())

    before = {key: values(key).full_tensor() for key in ADAM}
    report = relora.reset_optimizer_(optimizer, [p], prune_ratio=0.9)
    after = {key: values(key).full_tensor() for key in ADAM}
    optimizer.step()
    return {
        **{f"before/{key}": value for key, value in before.items()},
        **{f"after/{key}": value for key, value in after.items()},
        "zeroed": torch.tensor(report.zeroed),
        "finite": full(p.detach()).isfinite().all(),
    }


def test_a_reset_of_sharded_codes_zeroes_by_the_order_of_the_whole(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    for result in on_processes(eight_bits, 2, tmp_path / "ranks"):
        mask = mask_by_sorting(result["before/exp_avg"], 0.9)
        for key in ADAM:
            expected = result[f"before/{key}"].masked_fill(mask, 0)
            assert torch.equal(result[f"after/{key}"], expected)
        assert result["zeroed"] == 2 * dropped(128 * 80, 0.9)
        assert result["finite"]


def train(params, optimizer):
    """Take steps around a reset, and return the reset's report."""
    report = None
    for step in range(6):
        if step == 3:
            report = relora.reset_optimizer_(optimizer, params, prune_ratio=0.7)
        for index, p in enumerate(params):
            p.grad = gradient(index, step, p.shape)
        optimizer.step()
    return report


def under_zero(rank, world_size, wrapped):
    # Importing it warns of torch.jit, which would be an error in the process of the tests.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = [nn.Parameter(whole) for whole in whole_parameters()]
    optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=1e-2)
    if wrapped:
        optimizer = relora.ResettableOptimizer(optimizer)
    report = train(params, optimizer)
    zeroed = torch.tensor([report.zeroed, report.entries])
    dist.all_reduce(zeroed)
    optimizer.consolidate_state_dict(to=0)
    kept = optimizer.state_dict()["state"] if rank == 0 else {}
    moments = {
        f"{index}/{key}": torch.as_tensor(value)
        for index, state in kept.items()
        for key, value in state.items()
    }
    return {"zeroed": zeroed, **{f"{i}": p for i, p in enumerate(params)}, **moments}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_run_under_zero_is_that_of_one_process(tmp_path, world_size, wrapped):
    """Also its consolidated state, which indexing the state of others' parameters would break."""
    params = [nn.Parameter(whole) for whole in whole_parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    report = train(params, optimizer)
    results = on_processes(under_zero, world_size, tmp_path / "ranks", wrapped)
    for result in results:
        assert result["zeroed"].tolist() == [report.zeroed, report.entries]
        for index, p in enumerate(params):
            assert torch.equal(result[f"{index}"], p)
    for index, p in enumerate(params):
        for key, value in optimizer.state[p].items():
            assert torch.equal(results[0][f"{index}/{key}"], value)

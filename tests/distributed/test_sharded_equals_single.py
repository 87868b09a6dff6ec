"""Under FSDP2 the primitives do what they do on one process, with uneven shards too."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import relora_core as relora
from relora_core.optim import radix_select as selection
from tests.distributed.nets import Net
from tests.distributed.processes import assert_same_run, full, on_processes

STEPS, EVERY = 30, 8  # three restarts


def train(rank, world_size, wrap):
    """Return losses, parameters, draws and norms of a run whose ranks share each batch."""
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(1000 + rank)  # from here on every rank's randomness is its own
    relora.add_low_rank_(model, ["mlp.0"], rank=3, alpha=6.0, seed=3)
    relora.add_low_rank_(model, ["mlp.2"], rank=3, alpha=6.0, seed=3, trainable_scale=True)
    model = wrap(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = relora.ResettableOptimizer(torch.optim.AdamW(trained, lr=1e-2))
    restarts = relora.Restarts(every=EVERY, warmup=2)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    schedule = relora.JaggedLR(constant, restarts)
    data = torch.Generator().manual_seed(7)
    result, losses = {}, []
    for step in range(STEPS):
        x, y = torch.randn(12, 5, generator=data), torch.randn(12, generator=data)
        if restarts.at(step):
            torch.rand(rank + 1)
            with torch.no_grad():
                model(x)  # leaves FSDP's root unsharded: the restart must reshard it
            report = relora.restart_(model, optimizer, prune_ratio=0.5)
            for name, site in relora.low_rank_sites(model):
                result[f"draw/{step}/{name}"] = full(site.lora_A).clone()
                result[f"norm/{step}/{name}"] = torch.tensor(report.update_norms[name])
                result[f"zeroed/{step}"] = torch.tensor(report.reset.zeroed)
                for which in ("lora_A", "lora_B"):
                    moment = optimizer.state[getattr(site, which)]["exp_avg"]
                    result[f"mask/{step}/{name}/{which}"] = full(moment) != 0
        part = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
        loss = (model(x[part]) - y[part]).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if world_size > 1:
            loss = loss.detach().clone()
            torch.distributed.all_reduce(loss)
            loss /= world_size
        losses.append(loss.detach())
    result["losses"] = torch.stack(losses)
    for name, tensor in relora.merged_state_dict(model).items():
        result[f"weight/{name}"] = full(tensor)
    return result


def single():
    return train(0, 1, lambda model: model)


def under_fsdp(rank, world_size, sizes, reshard):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])

    def wrap(model):
        fully_shard(model.mlp, mesh=mesh, reshard_after_forward=reshard)
        return fully_shard(model, mesh=mesh)

    return train(rank, world_size, wrap)


def over_whole_bases(rank, world_size):
    """The frozen weights stay whole on every rank, outside FSDP: only what trains is sharded."""
    mesh = init_device_mesh("cpu", (world_size,))

    def wrap(model):
        bases = {site.weight for _, site in relora.low_rank_sites(model)}
        fully_shard(model.mlp, mesh=mesh, ignored_params=bases)
        return fully_shard(model, mesh=mesh, ignored_params=bases)

    return train(rank, world_size, wrap)


def under_ddp(rank, world_size):
    return train(rank, world_size, DistributedDataParallel)


def compare(results, expected):
    assert_same_run(results, expected, exact=("draw/", "zeroed/", "mask/"))


@pytest.mark.parametrize(
    ("sizes", "reshard"),
    [((1,), True), ((2,), True), ((3,), True), ((4,), True), ((2,), False), ((2, 2), True)],
    ids=["1", "2", "3", "4", "2 kept gathered", "2 replicas of 2 shards"],
)
def test_a_run_with_restarts_is_the_same_under_fsdp(tmp_path, sizes, reshard):
    results = on_processes(under_fsdp, math.prod(sizes), tmp_path / "ranks", sizes, reshard)
    compare(results, single())


def offloaded(rank, world_size):
    """Shards that wait on the CPU; with no GPU they are computed there too."""
    mesh = init_device_mesh("cpu", (world_size,))

    def wrap(model):
        fully_shard(model.mlp, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        return fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))

    return train(rank, world_size, wrap)


def test_a_run_with_restarts_is_the_same_with_offloaded_shards(tmp_path):
    compare(on_processes(offloaded, 2, tmp_path / "ranks"), single())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_run_with_restarts_is_the_same_over_whole_bases(tmp_path, world_size):
    results = on_processes(over_whole_bases, world_size, tmp_path / "ranks")
    compare(results, single())
    for name, tensor in results[0].items():
        assert all(torch.equal(result[name], tensor) for result in results)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_run_with_restarts_is_the_same_under_ddp(tmp_path, world_size):
    results = on_processes(under_ddp, world_size, tmp_path / "ranks")
    compare(results, single())
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor)  # replicas stay bit-equal


LAYOUTS = {
    "rows over a square": ((2, 2), (Shard(0), Shard(0))),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "replicas of shards": ((2, 2), (Replicate(), Shard(0))),
    "shards of replicas": ((2, 2), (Shard(1), Replicate())),
}


def whole_tensors(dtype):
    generator = torch.Generator().manual_seed(5)
    shapes = [(10, 7), (2, 5), (1, 4), (5, 3), (6, 6)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for tensor in tensors:
        tensor.view(-1)[::3] = 0.5  # ties
    return tensors


def prune_over_a_mesh(rank, world_size, layout):
    sizes, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", sizes)
    result = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        shards = [distribute_tensor(t, mesh, placements) for t in whole_tensors(dtype)]
        for index, mask in enumerate(selection.smallest((s, s.numel() // 2) for s in shards)):
            shape, stride = shards[index].shape, shards[index].stride()
            whole = DTensor.from_local(mask, mesh, placements, shape=shape, stride=stride)
            result[f"{dtype}/{index}"] = whole.full_tensor()
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selection_over_a_mesh_of_two_dimensions_is_that_of_one_process(tmp_path, layout):
    results = on_processes(prune_over_a_mesh, 4, tmp_path / "ranks", layout)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        wholes = whole_tensors(dtype)
        expected = selection.smallest((whole, whole.numel() // 2) for whole in wholes)
        for result in results:
            for index, mask in enumerate(expected):
                assert torch.equal(result[f"{dtype}/{index}"], mask), (dtype, index)


def reset_over_tensor_parallelism(rank, world_size):
    """FSDP2 over rows that tensor parallelism has split: strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 16, bias=False))
    whole = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    model[0].weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)]))
    fully_shard(model, mesh=mesh["dp"])
    (weight,) = model.parameters()
    optimizer = torch.optim.AdamW([weight])
    weight.grad = weight.detach().clone()
    optimizer.step()
    for ratio in (0.25, 0.5, 0.99):
        relora.reset_optimizer_(optimizer, [weight], prune_ratio=ratio)
    kept = optimizer.state[weight]["exp_avg"].full_tensor()
    if rank == 3:
        optimizer.state[weight]["exp_avg"].to_local().fill_(float("nan"))
    with pytest.raises(ValueError, match="hold NaN"):  # on every rank
        relora.reset_optimizer_(optimizer, [weight])
    return {"kept": kept, "whole": whole}


def test_strided_shards_are_reset_as_the_whole(tmp_path):
    for result in on_processes(reset_over_tensor_parallelism, 4, tmp_path / "ranks"):
        largest = result["whole"].abs().flatten().argmax()
        assert result["kept"].flatten().nonzero().tolist() == [[int(largest)]]


def count_collectives(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    counts = []
    for tensors in (1, 20):
        whole = torch.ones(9, 4)  # equal entries: the most passes there are
        params = [
            torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])) for _ in range(tensors)
        ]
        optimizer = torch.optim.AdamW(params)
        for p in params:
            p.grad = distribute_tensor(whole, mesh, [Shard(0)])
        optimizer.step()
        with CommDebugMode() as traffic:
            report = relora.reset_optimizer_(optimizer, params, prune_ratio=0.5)
        counts.append(traffic.get_total_counts())
        assert report.zeroed == tensors * 2 * 18
    return {"counts": torch.tensor(counts)}


def test_a_reset_takes_as_many_collectives_for_many_tensors_as_for_one(tmp_path):
    for result in on_processes(count_collectives, 2, tmp_path / "ranks"):
        one, many = result["counts"].tolist()
        assert one == many == 1 + 3 + 1  # NaN; 31 bits of magnitudes; 7 bits of places


def prune_sharded(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    result = {}
    for shape in ((10, 7), (2, 5), (1, 4), (9,)):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        whole.view(-1)[::3] = 0.5  # ties
        for placement in (Shard(0), Shard(len(shape) - 1), Replicate()):
            for dtype in (torch.float32, torch.bfloat16):
                sharded = distribute_tensor(whole.to(dtype), mesh, [placement])
                relora.magnitude_prune_(sharded, ratio=0.6)
                result[f"{shape}/{placement}/{dtype}"] = sharded.full_tensor()
    return result


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_pruning_a_sharded_tensor_equals_pruning_the_whole(tmp_path, world_size):
    for result in on_processes(prune_sharded, world_size, tmp_path / "ranks"):
        for name, pruned in result.items():
            shape = tuple(int(n) for n in name.split("/")[0].strip("(),").split(",") if n.strip())
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(5))
            whole.view(-1)[::3] = 0.5
            expected = relora.magnitude_prune_(whole.to(pruned.dtype), ratio=0.6)
            assert torch.equal(pruned, expected), name


def refusals(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    model = fully_shard(Net(), mesh=mesh)
    messages = []
    for refused in (
        lambda: relora.add_low_rank_(model, ["mlp.*"], rank=2),
        lambda: relora.register_low_rank(model.mlp[0], rank=2),
    ):
        with pytest.raises(ValueError, match="before fully_shard") as caught:
            refused()
        messages.append(str(caught.value))
    sited = relora.add_low_rank_(Net(), ["mlp.*"], rank=2)
    fully_shard(sited, mesh=mesh)
    with pytest.raises(ValueError, match="cannot be removed after fully_shard"):
        relora.remove_low_rank(sited.mlp[0])
    site = dict(relora.low_rank_sites(sited))["mlp.0"]
    with torch.no_grad():
        sited(torch.ones(2, 5))  # the root's parameters are gathered now
    for refused in (
        lambda: relora.merge_(sited.mlp[0]),
        lambda: relora.reinit_(sited.mlp),
        site.merge_,
        site.redraw_,
    ):
        with pytest.raises(ValueError, match=r"mlp.0 are gathered.*reshard\(\)"):
            refused()
    with pytest.raises(ValueError, match="cannot be removed after fully_shard"):
        relora.remove_low_rank(sited.mlp[0])
    assert site.restart == 0
    setting = type(site.low_rank).__setattr__  # another one, FSDP2 would call at every gathering
    assert setting is torch.nn.Module.__setattr__
    fresh = relora.add_low_rank_(Net(), ["mlp.*"], rank=2)
    relora.save_adapters(fresh.mlp, "adapter")
    dist.barrier()
    fully_shard(fresh, mesh=mesh)
    with torch.no_grad():
        fresh(torch.ones(2, 5))
    with pytest.raises(ValueError, match="are gathered"):  # though nobody has looked before
        relora.merge_(fresh.mlp)
    with pytest.raises(ValueError, match="are gathered"):
        relora.load_adapters(fresh.mlp, "adapter")
    with pytest.raises(ValueError, match="in DistributedDataParallel already"):
        relora.add_low_rank_(DistributedDataParallel(Net()), ["mlp.*"], rank=2)
    sited.reshard()
    if rank == world_size - 1:  # one rank's shard alone is broken: all ranks refuse together
        with torch.no_grad():
            site.lora_B.to_local().fill_(float("nan"))
    optimizer = torch.optim.AdamW([p for p in sited.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="not finite"):
        relora.restart_(sited, optimizer)
    return {"done": torch.ones(1)}


def test_misuse_is_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(on_processes(refusals, 2, tmp_path / "ranks")) == 2

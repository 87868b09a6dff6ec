"""With weights split by tensor parallelism, a run equals that of one process.

Split by rows and by columns, alone and under FSDP2, whose shards are then strided.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import relora_core as relora
from relora_core.distributed import dtensor
from relora_core.sites.bases import split_bases_
from tests.distributed.processes import assert_same_run, full, on_processes

STEPS, EVERY, SEQUENCES = 30, 8, 4
WIDTH = 12 if dtensor._MISPLACES else 10  # 10 is uneven over 4, and over 2 x 2
TARGETS = ("embed", "up", "down", "head")


class Net(nn.Module):
    """The plan below splits `up` by rows, `down` by columns, and leaves the rest whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, WIDTH)
        self.down = nn.Linear(WIDTH, 6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def plan():
    return {
        "embed": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    }


def train(rank, replicas, replica, wrap, **options):
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(1000 + rank)
    model = wrap(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = relora.ResettableOptimizer(torch.optim.AdamW(trained, lr=1e-2))
    restarts = relora.Restarts(every=EVERY, warmup=2)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    schedule = relora.JaggedLR(constant, restarts)
    data = torch.Generator().manual_seed(7)
    result, losses = {}, []
    for step in range(STEPS):
        tokens = torch.randint(0, 11, (SEQUENCES, 6), generator=data)
        if restarts.at(step):
            report = relora.restart_(model, optimizer, **options)
            for name, site in relora.low_rank_sites(model):
                result[f"draw/{step}/{name}"] = full(site.lora_A)
                result[f"norm/{step}/{name}"] = torch.tensor(report.update_norms[name])
                for factor in (site.lora_A, site.lora_B):
                    kept = full(optimizer.state[factor]["exp_avg"]) != 0
                    result[f"mask/{step}/{name}/{tuple(factor.shape)}"] = kept
        share = SEQUENCES // replicas
        mine = tokens[replica * share : (replica + 1) * share]
        loss = F.cross_entropy(model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    result["losses"] = torch.stack(losses)
    if replicas > 1:
        torch.distributed.all_reduce(result["losses"])
        result["losses"] /= torch.distributed.get_world_size()
    for name, tensor in relora.merged_state_dict(model).items():
        result[f"weight/{name}"] = full(tensor)
    return result


def sited(model):
    relora.add_low_rank_(model, TARGETS[:-1], rank=3, alpha=6.0, seed=3)
    return relora.add_low_rank_(model, TARGETS[-1:], rank=3, seed=3, trainable_scale=True)


def split(rank, world_size, sizes, options):
    names = ("replicas", "columns")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)

    def wrap(model):
        sited(parallelize_module(model, mesh["columns"], plan()))
        return fully_shard(model, mesh=mesh["replicas"]) if len(sizes) > 1 else model

    if len(sizes) == 1:
        return train(rank, 1, 0, wrap, **options)
    return train(rank, sizes[0], mesh["replicas"].get_local_rank(), wrap, **options)


RULES = {
    "magnitude": {"prune_ratio": 0.5},
    "random": {"prune_ratio": 0.5, "rule": "random"},
    "all": {"prune_ratio": 1.0},
}


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [((2,), "magnitude"), ((4,), "all"), ((2, 2), "magnitude"), ((2, 2), "random")],
    ids=[
        "columns over 2",
        "columns over 4, uneven",
        "2 shards of 2 columns",
        "the same, at random",
    ],
)
def test_a_run_with_restarts_is_that_of_one_process(tmp_path, sizes, rule):
    options = RULES[rule]
    expected = train(0, 1, 0, sited, **options)
    results = on_processes(split, math.prod(sizes), tmp_path / "ranks", sizes, options)
    assert_same_run(results, expected, exact=("draw/", "mask/"))


def refusals(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    by_hand = nn.Linear(6, 4)
    by_hand.weight = nn.Parameter(distribute_tensor(by_hand.weight, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"sharded already: .* after parallelize_module"):
        relora.register_low_rank(by_hand, rank=2)
    by_rows = parallelize_module(Net(), mesh, {"embed": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"embed: .* split by rows"):
        relora.add_low_rank_(by_rows, "embed", rank=2)
    model = parallelize_module(Net(), mesh, plan())
    with pytest.raises(ValueError, match=r"drop different entries .* got dropout=0.1"):
        relora.add_low_rank_(model, "up", rank=2, dropout=0.1)
    assert not list(relora.low_rank_sites(model))
    sited(model)
    with pytest.raises(ValueError, match="embed: only a whole W can be split"):
        split_bases_(model)
    up, before = model.up, full(model.up.parametrizations.weight.original)
    with torch.no_grad():
        relora.Site(up, "weight").lora_B.fill_(1.0)
    update = full(up.weight.delta())
    relora.remove_low_rank(up)
    return {"update": update, "change": full(up.weight) - before}


def test_what_would_be_wrong_is_refused_and_a_site_can_be_removed(tmp_path):
    for result in on_processes(refusals, 2, tmp_path / "ranks"):
        torch.testing.assert_close(result["change"], result["update"])
        assert result["update"].abs().max() > 0.1


def uneven(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "columns"))
    model = nn.Sequential(nn.Linear(6, 10, bias=False))
    whole = model[0].weight.detach().clone()
    parallelize_module(model, mesh["columns"], {"0": ColwiseParallel()})
    relora.add_low_rank_(model, "0", rank=2)
    fully_shard(model, mesh=mesh["replicas"])
    weight = relora.merged_state_dict(model)["0.weight"]
    dtensor._MISPLACES = True
    with pytest.raises(ValueError, match=r"even; got 10 rows over 2 x 2 processes"):
        dtensor.full(weight)
    return {"whole": whole}


def test_shards_that_torch_would_put_together_wrongly_are_refused(tmp_path):
    assert len(on_processes(uneven, 4, tmp_path / "ranks")) == 4

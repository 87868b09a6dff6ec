"""Banks of experts under FSDP2 match one process; refusals, loading, interrupted restarts."""

import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import relora_core as relora
from tests.core.banks import FORMS, Bank
from tests.distributed.processes import assert_same_run, full, on_processes

STEPS, EVERY = 14, 5


class Experts(nn.Module):
    """Three of them, so that two processes have two and one, and four one or none."""

    def __init__(self, form):
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.mlp = nn.Sequential(Bank(FORMS[form], (3, 7, 6), torch.float32))
        self.last = nn.Linear(7, 1)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        return self.last(self.mlp(h.unflatten(0, (3, -1)))).flatten()


def train(rank, world_size, wrap, form):
    torch.manual_seed(0)
    model = Experts(form)
    torch.manual_seed(1000 + rank)
    targets = ["*.experts", "inner"]
    relora.add_low_rank_(model, targets, rank=2, alpha=6.0, seed=3, batch_dims=1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    model = wrap(model)
    averaged.module = wrap(averaged.module) if world_size > 1 else averaged.module
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = torch.Generator().manual_seed(7)
    result = {}
    for step in range(STEPS):
        if step and step % EVERY == 0:
            torch.rand(rank + 1)
            report = relora.restart_(model, optimizer, prune_ratio=0.5)
            for name, site in relora.low_rank_sites(model):
                result[f"draw/{step}/{name}"] = full(site.lora_A)
                result[f"norm/{step}/{name}"] = torch.tensor(report.update_norms[name])
                result[f"mask/{step}/{name}"] = full(optimizer.state[site.lora_B]["exp_avg"]) != 0
            result[f"zeroed/{step}"] = torch.tensor(report.reset.zeroed)
        x, y = torch.randn(12, 3, 5, generator=data), torch.randn(12, 3, generator=data)
        part = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
        x, y = x[part].transpose(0, 1).flatten(0, 1), y[part].t().flatten()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        optimizer.zero_grad()
    for name, tensor in relora.merged_state_dict(model).items():
        result[f"weight/{name}"] = full(tensor)
    for name, tensor in relora.merged_state_dict(averaged.module).items():
        result[f"average/{name}"] = full(tensor)
    return result


def under_fsdp(rank, world_size, form):
    mesh = init_device_mesh("cpu", (world_size,))

    def wrap(model):
        fully_shard(model.mlp, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return train(rank, world_size, wrap, form)


@pytest.mark.parametrize(("world_size", "form"), [(2, "bmm"), (2, "iteration"), (4, "einsum")])
def test_a_run_with_restarts_of_a_bank_is_the_same(tmp_path, world_size, form):
    """And so is an average of merged weights."""
    results = on_processes(under_fsdp, world_size, tmp_path / "ranks", form)
    expected = train(0, 1, lambda model: model, form)
    assert_same_run(results, expected, exact=("draw/", "zeroed/", "mask/"))


def small(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    relora.add_low_rank_(model, "*", rank=2)
    torch.manual_seed(1000 + rank)
    return model


def refuses(model, optimizer, message):
    with pytest.raises((ValueError, relora.OutOfStepError), match=message):
        relora.restart_(model, optimizer)
    return {site.restart for _, site in relora.low_rank_sites(model)} == {0}


def with_gradients(rank, world_size):
    """Reduced ones, those that wait to be reduced, and those of one process's part alone."""
    model = small(rank)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(3, 6)
    result = {}
    model.set_requires_gradient_sync(False)
    model(x).sum().backward()
    result["unreduced"] = refuses(model, optimizer, "no step has used")
    model.set_requires_gradient_sync(True)
    model(x).sum().backward()
    result["reduced"] = refuses(model, optimizer, "no step has used")
    optimizer.step()
    relora.restart_(model, optimizer)
    result["used"] = all(
        not full(p.grad).any()
        for _, site in relora.low_rank_sites(model)
        for p in (site.lora_A, site.lora_B)
    )
    _, site = next(relora.low_rank_sites(model))
    optimizer.zero_grad()
    site.lora_B.grad = torch.zeros_like(site.lora_B)
    if rank == 0:
        site.lora_B.grad.to_local().fill_(1.0)
    with pytest.raises(ValueError, match="no step has used"):
        relora.restart_(model, optimizer)
    result["of a part"] = site.restart == 1
    return {key: torch.tensor(value) for key, value in result.items()}


def test_gradients_that_no_step_has_used_are_refused_on_every_process(tmp_path):
    for result in on_processes(with_gradients, 2, tmp_path / "ranks"):
        assert all(result.values()), result


def under_fsdp1(rank, world_size, directory):
    model = FullyShardedDataParallel(
        small(rank), use_orig_params=True, device_id=torch.device("cpu")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    calls = {
        "restart": lambda: relora.restart_(model, optimizer),
        "merge": lambda: relora.merge_(model),
        "export": lambda: relora.save_merged(model, directory),
        "state": lambda: relora.merged_state_dict(model),
        "sites": lambda: relora.add_low_rank_(model, "*", rank=1),
    }
    result = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"FSDP1.* use fully_shard"):
            call()
        result[name] = torch.tensor(True)
    return result


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp1_is_refused_before_anything(tmp_path):
    out = tmp_path / "out"
    assert len(on_processes(under_fsdp1, 2, tmp_path / "ranks", str(out))) == 2
    assert not out.exists()


def loaded_by_accelerate(rank, world_size):
    """Broadcast from the first process, as `cpu_ram_efficient_loading` has it."""
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict

    model = small(rank)
    for _, site in relora.low_rank_sites(model):
        nn.init.constant_(site.lora_B, 0.5)
    relora.reinit_(model)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    other = small(rank)
    fully_shard(other, mesh=init_device_mesh("cpu", (world_size,)))
    accelerator = types.SimpleNamespace(is_main_process=rank == 0, device=torch.device("cpu"))
    fsdp2_load_full_state_dict(accelerator, other, expected if rank == 0 else {})
    found = {key: full(tensor) for key, tensor in other.state_dict().items()}
    same = all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    numbers = {site.restart for _, site in relora.low_rank_sites(other)}
    return {"same": torch.tensor(same), "number": torch.tensor(numbers == {1})}


def test_accelerate_s_loader_takes_a_model_with_sites(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    for result in on_processes(loaded_by_accelerate, 2, tmp_path / "ranks"):
        assert result["same"]
        assert result["number"]


def broken_apart(rank, world_size):
    """One process is broken off in a restart, and the others are done."""
    model = small(rank)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    relora.restart_(model, optimizer)
    if rank == 0:
        for _, site in relora.low_rank_sites(model):
            site.low_rank.restarting = 1
        site.low_rank.restart = 0
    with pytest.raises(relora.OutOfStepError, match="must do the same"):
        relora.restart_(model, optimizer)
    dist.barrier()
    return {"number": torch.tensor([s.restart for _, s in relora.low_rank_sites(model)])}


def test_processes_that_were_broken_off_apart_do_not_go_on(tmp_path):
    results = on_processes(broken_apart, 2, tmp_path / "ranks")
    assert results[1]["number"].tolist() == [1, 1]

"""Merged copies of a sharded model are those of one process, over steps, restarts and loading."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import relora_core as relora
from tests.distributed.nets import Net
from tests.distributed.processes import full, on_processes
from tests.reference import randomize_

STEPS, EVERY = 12, 4


def low_rank(seed=0):
    torch.manual_seed(seed)
    model = relora.add_low_rank_(Net(), ["mlp.*"], rank=3, alpha=6.0)
    randomize_(model)
    return model


def sharded(model, mesh, whole):
    kept = relora.keep_merged_(model, mesh=mesh)
    copies = [s.low_rank.merged_copy for _, s in relora.low_rank_sites(model)] if whole else []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (model.mlp, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params={*kept, *copies})
    return model


def output(model, x):
    """In bf16: under autocast, which for FSDP2's casts has nothing left to do."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(x.bfloat16())


def trained(model, steps=STEPS):
    """Train in bf16 as on every process; every process sees the whole batch."""
    optimizer = relora.ResettableOptimizer(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    )
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for step in range(steps):
        if step % EVERY == EVERY - 1:
            with torch.no_grad():
                before = output(model, torch.ones(2, 5))
            relora.restart_(model, optimizer, prune_ratio=1.0)
            with torch.no_grad():
                assert torch.equal(output(model, torch.ones(2, 5)), before)
        y = output(model, torch.randn(8, 5, generator=generator))
        outputs.append(y.detach().float())
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def run(rank, world_size, replicas, whole):
    sizes = (replicas, world_size // replicas) if replicas > 1 else (world_size,)
    names = ("replicas", "shards")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    model = sharded(low_rank(), mesh, whole)
    if whole:
        for _, site in relora.low_rank_sites(model):
            assert type(site.low_rank.merged_copy) is torch.nn.Parameter
    outputs = trained(model)
    other = sharded(low_rank(seed=5), mesh, whole)
    other.load_state_dict(model.state_dict())
    found = {"outputs": torch.stack(outputs)}
    model.reshard()
    return found | seen(model, "trained") | seen(other, "loaded")


def seen(model, which):
    found = {}
    for name, site in relora.low_rank_sites(model):
        found |= {
            f"{which}/{name}/W": full(site.weight),
            f"{which}/{name}/A": full(site.lora_A),
            f"{which}/{name}/B": full(site.lora_B),
            f"{which}/{name}/copy": full(site.low_rank.merged_copy),
            f"{which}/{name}/scale": torch.tensor(site.scale),
        }
    return found


def assert_fresh(found, count):
    """Assert that so many copies are what their W, A and B say, to the bit."""
    names = [name.removesuffix("/copy") for name in found if name.endswith("/copy")]
    assert len(names) == count
    for name in names:
        W, A, B, s = (found[f"{name}/{key}"] for key in ("W", "A", "B", "scale"))
        both = torch.cat((torch.add(W, B @ A, alpha=s.item()), B), dim=1).bfloat16()
        assert torch.equal(found[f"{name}/copy"][:, : both.shape[1]], both)


def looked_at(rank, world_size):
    """What is gathered for a look, and stays so, hides the factors that an optimizer has."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = low_rank()
    kept = relora.keep_merged_(model, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(kept), reshard_after_forward=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    output(model, torch.ones(2, 5)).float().square().mean().backward()
    with torch.no_grad():
        output(model, torch.ones(2, 5))
    optimizer.step()
    model.reshard()
    return seen(model, "looked at")


def test_copies_follow_a_step_after_a_look(tmp_path):
    for found in on_processes(looked_at, 2, tmp_path / "ranks"):
        assert_fresh(found, 2)


@pytest.mark.parametrize(
    ("world_size", "replicas"),
    [(1, 1), (2, 1), (3, 1), (4, 2)],
    ids=["1", "2", "3", "2 replicas of 2 shards"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["copies sharded", "copies whole"])
def test_copies_are_what_the_factors_say_on_every_process(tmp_path, world_size, replicas, whole):
    results = on_processes(run, world_size, tmp_path / "ranks", replicas, whole)
    single = low_rank()
    relora.keep_merged_(single)
    expected = torch.stack(trained(single))
    for found in results:
        # In bf16, summed in another order over processes.
        assert (found["outputs"] - expected).norm() < 0.02 * expected.norm()
        assert_fresh(found, 4)
        for name, tensor in results[0].items():
            assert torch.equal(found[name], tensor), name

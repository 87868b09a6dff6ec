"""An adapter of a sharded model is that of one process, whoever reads it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import relora_core as relora
from relora_core.distributed.sharding import copy_from_full_
from tests.distributed.nets import Net
from tests.distributed.processes import full, on_processes


def low_rank(seed):
    torch.manual_seed(0)
    model = relora.add_low_rank_(Net(), ["mlp.0"], rank=3, alpha=6.0, seed=seed)
    return relora.add_low_rank_(model, ["mlp.2"], rank=2, seed=seed, trainable_scale=True)


@torch.no_grad()
def learn_(model):
    relora.reinit_(model)
    generator = torch.Generator().manual_seed(4)
    for _, site in relora.low_rank_sites(model):
        for factor in (site.lora_A, site.lora_B):
            copy_from_full_(factor, torch.randn(factor.shape, generator=generator))
        if site.low_rank.lora_scale is not None:
            copy_from_full_(site.low_rank.lora_scale, torch.tensor([1.75]))


def save_and_load(rank, world_size, directory):
    mesh = init_device_mesh("cpu", (world_size,))
    models = [low_rank(seed=3), low_rank(seed=4)]
    for model in models:
        fully_shard(model.mlp, mesh=mesh)
        fully_shard(model, mesh=mesh)
    learn_(models[0])
    relora.save_adapters(models[0], directory)
    dist.barrier()
    relora.load_adapters(models[1], directory)
    relora.reinit_(models[1])
    draws = {name: full(site.lora_A) for name, site in relora.low_rank_sites(models[1])}
    relora.load_adapters(models[1], directory)
    return {
        **{f"{name}/draw": draw for name, draw in draws.items()},
        **{f"{name}/A": full(site.lora_A) for name, site in relora.low_rank_sites(models[1])},
        **{f"{name}/B": full(site.lora_B) for name, site in relora.low_rank_sites(models[1])},
        "scale": torch.tensor([site.scale for _, site in relora.low_rank_sites(models[1])]),
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_it_is_saved_and_loaded_over_uneven_shards(tmp_path, world_size):
    model = low_rank(seed=3)
    learn_(model)
    relora.save_adapters(model, tmp_path / "single")
    sites = dict(relora.low_rank_sites(model))
    expected = {f"{name}/A": full(site.lora_A) for name, site in sites.items()}
    expected |= {f"{name}/B": full(site.lora_B) for name, site in sites.items()}
    expected["scale"] = torch.tensor([2.0, 1.75])
    relora.reinit_(model)
    expected |= {f"{name}/draw": full(site.lora_A) for name, site in sites.items()}

    results = on_processes(save_and_load, world_size, tmp_path / "ranks", tmp_path / "many")
    for result in results:
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[key], expected[key]) for key in expected)
    one, many = (tmp_path / which for which in ("single", "many"))
    config = "adapter_config.json"
    assert (one / config).read_bytes() == (many / config).read_bytes()
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in (one, many))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def load_where_one_lacks_the_file(rank, world_size, directory):
    mesh = init_device_mesh("cpu", (world_size,))
    model = low_rank(seed=4)
    fully_shard(model, mesh=mesh)
    before = {name: full(site.lora_A) for name, site in relora.low_rank_sites(model)}
    with pytest.raises(
        RuntimeError, match=r"raises an error: .* must be a LoRA adapter's configuration"
    ):
        relora.load_adapters(model, Path(directory) / "absent" if rank else directory)
    return {
        f"{name}/{which}": tensor
        for name, site in relora.low_rank_sites(model)
        for which, tensor in (("before", before[name]), ("after", full(site.lora_A)))
    }


def test_it_is_loaded_by_all_or_by_none(tmp_path):
    model = low_rank(seed=3)
    learn_(model)
    relora.save_adapters(model, tmp_path / "single")
    run = load_where_one_lacks_the_file
    for result in on_processes(run, 2, tmp_path / "ranks", tmp_path / "single"):
        for name in ("mlp.0", "mlp.2"):
            assert torch.equal(result[f"{name}/after"], result[f"{name}/before"])

"""The trainer's layouts over processes: every one computes what one process does."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import relora_core as relora
from reference_trainer.config import (
    BatchConfig,
    Config,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReLoRAConfig,
)
from reference_trainer.distributed import lay_world
from reference_trainer.phases import phases
from reference_trainer.train import forward_backward
from reference_trainer.train_state import build_state, fill_
from tests.distributed.processes import assert_same_run, full, on_processes

STEPS, EVERY, SEQUENCES, LENGTH, VOCAB = 30, 8, 12, 16, 40  # three restarts


def configuration(precision, layout, replicas):
    """Widths and a rank that 3 and 4 do not divide."""
    return Config(
        steps=STEPS,
        model=ModelConfig(hidden_size=20, intermediate_size=26, layers=2, heads=2),
        batch=BatchConfig(sequences=SEQUENCES, length=LENGTH, micro=6),
        optim=OptimConfig(eps=1e-6),  # tiny gradients after a restart are no more than noise
        relora=ReLoRAConfig(warm_start=0, rank=5, every=EVERY, warmup=2, prune_ratio=0.5),
        parallel=ParallelConfig("cpu", precision, layout=layout, replicas=replicas),
    )


def train(rank, world_size, precision, layout, replicas):
    config = configuration(precision, layout, replicas)
    world = lay_world(config.parallel, torch.device("cpu"))
    (phase,) = phases(config)
    state = build_state(config, phase, config.model.shape(VOCAB), world)
    fill_(state, config, None, world)
    torch.rand(rank + 1)
    result, losses = {}, []
    for step in range(STEPS):
        if state.phase.restarts_at(step):
            relora.restart_(state.model, state.optimizer, prune_ratio=config.relora.prune_ratio)
            for name, site in relora.low_rank_sites(state.model):
                for which in ("lora_A", "lora_B"):
                    factor = getattr(site, which)
                    key = f"{step}/{name}/{which}"
                    result[f"redrawn/{key}"] = full(factor)
                    result[f"mask/{key}"] = full(state.optimizer.state[factor]["exp_avg"]) != 0
                result[f"base/{step}/{name}"] = full(site.exact())
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
        micro_steps = config.batch.micro_steps(world_size)
        parts = batch.view(micro_steps, world_size, -1, LENGTH + 1)[:, rank]
        loss = forward_backward(state.model, parts, world)
        clip_grad_norm_(state.parameters.values(), config.optim.clip)
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        losses.append(torch.tensor(world.mean(loss)))
    result["losses"] = torch.stack(losses)
    for name, tensor in relora.merged_state_dict(state.model).items():
        result[f"weight/{name}"] = full(tensor)
    return result


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return a run of one process, sharded, in fp32 and in bf16."""
    return {
        precision: on_processes(
            train, 1, tmp_path_factory.mktemp("one") / precision, precision, "shard", 1
        )[0]
        for precision in ("fp32", "bf16")
    }


@pytest.mark.parametrize(
    ("world_size", "layout", "replicas"),
    [
        *((size, "shard", 1) for size in (2, 3, 4)),
        (4, "shard", 2),
        *((size, "replicate", 1) for size in (1, 2, 3, 4)),
        (4, "replicate", 2),
        (3, "replicate", 3),
    ],
)
def test_a_run_with_restarts_is_that_of_one_process(tmp_path, one, world_size, layout, replicas):
    expected = one["fp32"]
    results = on_processes(train, world_size, tmp_path / "ranks", "fp32", layout, replicas)
    assert_same_run(results, expected, exact=("redrawn/", "mask/"))


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (2, 2)])
def test_bases_in_halves_take_what_is_merged_as_fp32_ones_do(tmp_path, one, world_size, replicas):
    """In bf16, where a W stored in 16 bits would lose a tenth of it and more."""
    expected = one["bf16"]
    results = on_processes(train, world_size, tmp_path / "ranks", "bf16", "replicate", replicas)
    for name, tensor in expected.items():
        for result in results:
            assert torch.equal(result[name], results[0][name])  # replicas stay bit-equal
            if world_size == 1 or name.startswith(("redrawn/", "mask/")):
                assert torch.equal(result[name], tensor), name
    assert (results[0]["losses"] - expected["losses"]).abs().max() < 1e-5
    for name in (key.split("/")[2] for key in expected if key.startswith("base/24/")):
        first, last = (expected[f"base/{step}/{name}"] for step in (8, 24))
        merged = last - first
        ours = results[0][f"base/24/{name}"] - results[0][f"base/8/{name}"]
        coarse = (first.bfloat16() + merged).bfloat16().float() - first.bfloat16().float()
        assert (ours - merged).norm() < 1e-5 * merged.norm()
        assert (coarse - merged).norm() > 0.1 * merged.norm()

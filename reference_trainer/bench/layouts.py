"""The layouts of a model over processes, real ones or pretended ones, to count and track."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from reference_trainer.config import (
    Config,
    ParallelConfig,
    ReLoRAConfig,
    phases,
)
from reference_trainer.model import LlamaShape
from reference_trainer.stage import Stage, build_stage, narrow_
from reference_trainer.world import World


@dataclass(frozen=True)
class Layout:
    """One way to lay a phase's model over processes.

    Args:
        name: as a table shows it.
        low_rank: whether the phase is ReLoRA's; otherwise everything is trained.
        bases: `parallel.layout`.
        copied: whether what is trained is whole on every process too, its gradients summed
            (`parallel.replicas` as many as processes), rather than sharded.
    """

    name: str
    low_rank: bool = True
    bases: Literal["shard", "replicate"] = "shard"
    copied: bool = False


LAYOUTS = (
    Layout("full rank, sharded", low_rank=False),
    Layout("shard"),
    Layout("replicate", bases="replicate"),
    Layout("replicate, factors too", bases="replicate", copied=True),
)


@contextmanager
def pretended(processes: int) -> Iterator[None]:
    """Be the first of `processes`, the others of which do not exist, until the block ends.

    What is sent and kept has the sizes that it would have; values are not right.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_of(layout: Layout) -> World:
    """Return the layout's CPU world in the process group that there is."""
    size = dist.get_world_size()
    sizes = ParallelConfig(replicas=size if layout.copied else 1).mesh(size)
    names = ("replicas", "shards")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return World(dist.get_rank(), size, torch.device("cpu"), mesh)


def laid_out(
    layout: Layout, shape: LlamaShape, world: World, *, rank: int, recompute: bool = False
) -> Stage:
    """Return a stage of the model, computed in bf16, without values.

    Args:
        layout: how.
        shape: of the model.
        world: what `world_of` returned for the layout.
        rank: of its sites.
        recompute: checkpoint the activations of each block.
    """
    parallel = ParallelConfig("cpu", "bf16", checkpoint_activations=recompute, layout=layout.bases)
    relora = ReLoRAConfig(warm_start=0 if layout.low_rank else 2, rank=rank)
    config = Config(steps=2, relora=relora, parallel=parallel)
    (phase,) = phases(config)
    stage = build_stage(config, phase, shape, world)
    narrow_(stage, config, world)
    return stage

"""The layouts of a model over processes, real ones or pretended ones, to count and track."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # gives torch 2.8 their fake forms
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from reference_trainer.config import (
    BaseLayout,
    Checkpointing,
    Config,
    LogConfig,
    ParallelConfig,
    Precision,
    Reduce,
    ReLoRAConfig,
)
from reference_trainer.distributed import World, lay_world
from reference_trainer.model.llama import LlamaShape
from reference_trainer.phase_model import build_model
from reference_trainer.phases import phases
from reference_trainer.train_state import TrainState, with_memory
from relora_core.distributed.local import local


@dataclass(frozen=True)
class Layout:
    """One way to lay a phase's model over processes.

    Args:
        name: as a table shows it.
        low_rank: whether the phase is ReLoRA's; otherwise everything is trained.
        bases: `parallel.layout`.
        shards: over how many processes what is trained, and a sharded base, is split, the others
            holding replicas (`parallel.replicas` = processes / shards); all of them if None.
        base: `relora.base`.
        merged: whether merged copies are kept where the trainer keeps them.
    """

    name: str
    low_rank: bool = True
    bases: BaseLayout = "shard"
    shards: int | None = None
    base: Literal["keep", "bf16"] = "keep"
    merged: bool = True


FULL, SHARD, REPLICATE, BF16 = LAYOUTS = (
    Layout("full rank", low_rank=False),
    Layout("shard"),
    Layout("replicate", bases="replicate"),
    Layout("replicate, base bf16", bases="replicate", base="bf16"),
)


@dataclass(frozen=True)
class Step:
    """A training step to be looked at.

    Args:
        layout: how the model is laid over processes.
        shape: of the model.
        rank: of its sites.
        length: tokens of a sequence.
        sequences: that each process computes at once.
        recompute: `parallel.checkpoint_activations`.
        precision: of weights and computation.
        accumulates: whether it is the last micro-step of several.
        reduce: `parallel.reduce`, for those that accumulate.
    """

    layout: Layout
    shape: LlamaShape
    rank: int
    length: int
    sequences: int = 1
    recompute: Checkpointing = "none"
    precision: Precision = "bf16"
    accumulates: bool = False
    reduce: Reduce = "step"

    def of_blocks(self, blocks: int) -> "Step":
        """Return the same step of a model of so many blocks."""
        return replace(self, shape=replace(self.shape, layers=blocks))

    def parts(self, micro_steps: int = 1) -> Tensor:
        """Return a process's parts of a batch of so many micro-steps."""
        return torch.zeros(micro_steps, self.sequences, self.length + 1, dtype=torch.long)


def layouts(processes: int, node: int) -> list[Layout]:
    """Return the layouts of so many processes, also with shards within a node and of one process.

    Args:
        processes: how many.
        node: processes on a node.
    """
    within = [
        replace(layout, name=f"{layout.name}, shards of {node}", shards=node) for layout in LAYOUTS
    ]
    whole = replace(REPLICATE, name="replicate, factors too", shards=1)
    return [*LAYOUTS, *(within if processes > node else []), whole]


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
    replicas = size // (layout.shards or size)
    return lay_world(ParallelConfig(replicas=replicas), torch.device("cpu"))


def laid_out(
    step: Step, world: World, *, memory: AbstractContextManager[object] | None = None
) -> TrainState:
    """Return a step's train state, without values.

    Args:
        step: which.
        world: what `world_of` returned for its layout.
        memory: what gives out memory: a FakeTensorMode for none at all.
    """
    layout = step.layout
    parallel = ParallelConfig(
        "cuda" if world.device.type == "cuda" else "cpu",
        step.precision,
        checkpoint_activations=step.recompute,
        layout=layout.bases,
    )
    warm, base = (0 if layout.low_rank else 2), layout.base
    base = base if step.precision != "fp32" else "keep"
    relora = ReLoRAConfig(warm_start=warm, rank=step.rank, base=base)
    config = Config(steps=2, relora=relora, parallel=parallel, log=LogConfig(rank_sites=0))
    (phase,) = phases(config)
    with _HostMemory(memory) if memory else nullcontext():
        model = build_model(config, phase, step.shape, world, merged=layout.merged)
    with memory or nullcontext():
        return with_memory(model, config, phase, world)


@torch.no_grad()
def fill_(model: torch.nn.Module) -> None:
    """Give every parameter values of which a step makes something."""
    for p in model.parameters():
        local(p).fill_(0.02)


class _HostMemory(TorchFunctionMode):
    """Lets `memory` give what is made in the host's memory beside a model on the meta device."""

    def __init__(self, memory: AbstractContextManager[object]) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self._memory if kwargs.get("device") == "cpu" else nullcontext():
            return func(*args, **kwargs)

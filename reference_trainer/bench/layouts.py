"""The layouts of a model over real or simulated processes, for counting bytes and memory."""

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
    """A layout of a phase's model over processes.

    Args:
        name: name in tables.
        low_rank: whether the phase is ReLoRA; if not, all parameters are trained.
        bases: `parallel.layout`.
        shards: number of processes over which trained parameters and sharded bases are split. The
            other processes hold replicas (`parallel.replicas` = processes / shards). None for all
            processes.
        base: `relora.base`.
        merged: whether merged copies are kept, as in the trainer.
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
    """A training step to analyze.

    Args:
        layout: layout of the model over processes.
        shape: shape of the model.
        rank: rank of the sites.
        length: number of tokens in a sequence.
        sequences: number of sequences that each process computes at once.
        recompute: `parallel.checkpoint_activations`.
        precision: precision of the weights and the computation.
        accumulates: whether the step is the last of several micro-steps.
        reduce: `parallel.reduce`, for a step of several micro-steps.
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
        """Return the same step for a model of `blocks` blocks."""
        return replace(self, shape=replace(self.shape, layers=blocks))

    def parts(self, micro_steps: int = 1) -> Tensor:
        """Return a process's part of a batch, split into `micro_steps` micro-steps."""
        return torch.zeros(micro_steps, self.sequences, self.length + 1, dtype=torch.long)


def layouts(processes: int, node: int) -> list[Layout]:
    """Return the layouts to compare, including shards within a node and fully replicated factors.

    Args:
        processes: number of processes.
        node: number of processes on a node.
    """
    within = [
        replace(layout, name=f"{layout.name}, shards of {node}", shards=node) for layout in LAYOUTS
    ]
    whole = replace(REPLICATE, name="replicate, factors too", shards=1)
    return [*LAYOUTS, *(within if processes > node else []), whole]


@contextmanager
def pretended(processes: int) -> Iterator[None]:
    """Run the block as process 0 of `processes`; the other processes do not exist.

    Tensors that are sent and kept have their real sizes, but their values are wrong.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_of(layout: Layout) -> World:
    """Return the layout's world on CPUs in the current process group."""
    size = dist.get_world_size()
    replicas = size // (layout.shards or size)
    return lay_world(ParallelConfig(replicas=replicas), torch.device("cpu"))


def laid_out(
    step: Step, world: World, *, memory: AbstractContextManager[object] | None = None
) -> TrainState:
    """Return the train state of a step, with uninitialized values.

    Args:
        step: training step.
        world: world that `world_of` returned for the step's layout.
        memory: context of the allocation, such as a FakeTensorMode to allocate nothing.
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
    """Fill every parameter with a small constant, so that a step has finite values."""
    for p in model.parameters():
        local(p).fill_(0.02)


class _HostMemory(TorchFunctionMode):
    """A mode that makes CPU tensors under `memory` while the model is on the meta device."""

    def __init__(self, memory: AbstractContextManager[object]) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self._memory if kwargs.get("device") == "cpu" else nullcontext():
            return func(*args, **kwargs)

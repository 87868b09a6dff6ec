"""The workloads of a benchmark: a linear layer, a block or a model, with its input."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

import relora_core as relora
from reference_trainer.config import BaseLayout, Checkpointing, ParallelConfig
from reference_trainer.distributed import World
from reference_trainer.flops import block_matrices
from reference_trainer.model.llama import Block, Llama, LlamaShape, rotary_table
from reference_trainer.parallelize import build
from reference_trainer.phase_model import keep_copies_
from relora_core.distributed.local import local

Level = Literal["linear", "block", "model"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.float32}


@dataclass(frozen=True)
class Work:
    """A workload built for one arm, ready to run.

    Args:
        module: module to train.
        backward: function that runs forward and backward, and leaves gradients in `module`.
        forward: function that runs only forward, and returns the output.
    """

    module: nn.Module
    backward: Callable[[], None]
    forward: Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """The description of a workload, from which each arm's is built.

    Args:
        name: name such as "linear 5461x2048", "block" or "model".
        level: kind of workload.
        shape: shape of the model that it is part of.
        matrix: shape (out, in) of a linear layer's matrix.
        dtype: "fp32", "bf16" (also for weights) or "mixed" (fp32 weights, computation in bf16: by
            autocast for a linear layer or a block, by FSDP2's policy for a model).
        sequences: number of sequences in the batch.
        length: number of tokens in a sequence.
    """

    name: str
    level: Level
    shape: LlamaShape
    matrix: tuple[int, int]
    dtype: str
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """The number of tokens in the batch."""
        return self.sequences * self.length

    def work(
        self,
        prepare_: Callable[[nn.Module], None],
        world: World,
        *,
        compiled: bool = False,
        recompute: Checkpointing = "none",
        layout: BaseLayout = "shard",
    ) -> Work:
        """Build the workload on the world's device; values come from torch's global generator.

        Args:
            prepare_: function that turns the bare module into an arm, in place.
            world: world of one process.
            compiled: whether to compile the module.
            recompute: `parallel.checkpoint_activations`, for a model.
            layout: `parallel.layout`, for a model.
        """
        if self.level == "model":
            parallel = ParallelConfig(
                precision="fp32" if self.dtype == "fp32" else "bf16",
                compile=compiled,
                checkpoint_activations=recompute,
                layout=layout,
            )
            return self._model(prepare_, world, parallel)
        module = self._part(prepare_, world.device, DTYPES[self.dtype])
        draw_weights_(module, self.shape)
        if compiled:
            module.compile()
        # Under autocast the input of a linear layer is already in bf16.
        autocast = self.dtype == "mixed" and self.level == "linear"
        return self._work(module, world.device, torch.bfloat16 if autocast else DTYPES[self.dtype])

    def on_meta(self, prepare_: Callable[[nn.Module], None]) -> Work:
        """Build the workload on the meta device, to count operations."""
        meta = torch.device("meta")
        dtype = torch.float32 if self.dtype == "fp32" else torch.bfloat16
        return self._work(self._part(prepare_, meta, dtype), meta, dtype)

    def _part(
        self, prepare_: Callable[[nn.Module], None], device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        out, inner = self.matrix
        module: nn.Module
        with device:
            if self.level == "linear":
                module = _Linear(inner, out)
            elif self.level == "block":
                module = Block(self.shape)
            else:
                module = Llama(self.shape)
        module.to(dtype)
        prepare_(module)
        return module

    def _model(
        self,
        prepare_: Callable[[nn.Module], None],
        world: World,
        parallel: ParallelConfig,
    ) -> Work:
        def prepare_in_dtype_(module: nn.Module) -> list[nn.Parameter]:
            module.to(DTYPES[self.dtype])
            prepare_(module)
            sites = [site for _, site in relora.low_rank_sites(module)]
            whole = parallel.layout == "replicate"
            if sites and self.dtype == "mixed":  # as in the trainer
                return keep_copies_(module, world, dtype=torch.bfloat16, whole=whole)
            return [site.weight for site in sites] if whole else []

        model = build(self.shape, parallel, world, prepare_in_dtype_)
        model.to_empty(device=world.device)
        draw_weights_(model, self.shape)
        relora.refresh_merged_(model)
        return self._work(model, world.device, DTYPES[self.dtype])

    def _work(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Work:
        b, t, d = self.sequences, self.length, self.shape.hidden_size
        if self.level == "model":
            tokens = torch.randint(0, self.shape.vocab_size, (b, t + 1), device=device)

            def loss() -> Tensor:
                mean: Tensor = module(tokens[:, :-1], tokens[:, 1:])
                return mean

            return Work(module, lambda: torch.autograd.backward(loss()), loss)

        inner = d if self.level == "block" else self.matrix[1]
        x = torch.randn(b, t, inner, device=device, dtype=dtype, requires_grad=True)
        table = rotary_table(t, self.shape, device) if self.level == "block" else ()
        mixed = self.dtype == "mixed" and device.type != "meta"  # meta has no autocast

        def forward() -> Tensor:
            bf16 = torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()
            with bf16:
                output: Tensor = module(x, *table)
            return output

        g = torch.randn_like(forward())

        def backward() -> None:
            torch.autograd.backward(forward(), g)
            x.grad = None

        return Work(module, backward, forward)


def subjects(
    level: Level, shape: LlamaShape, *, dtype: str, sequences: int, length: int
) -> list[Subject]:
    """Return the workloads of a level; "linear" has one for each matrix shape in the model."""
    whole = Subject(level, level, shape, (0, 0), dtype, sequences, length)
    if level != "linear":
        return [whole]
    matrices = dict.fromkeys(block_matrices(shape))
    return [replace(whole, name=f"linear {m}x{n}", matrix=(m, n)) for m, n in matrices]


class _Linear(nn.Module):
    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.a_proj = nn.Linear(inner, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.a_proj(x)
        return output


@torch.no_grad()
def draw_weights_(module: nn.Module, shape: LlamaShape) -> None:
    """Draw all matrices, including factors, from one distribution; times do not depend on it."""
    for p in module.parameters():
        own = local(p)
        if p.ndim == 1:
            own.fill_(1.0)
        else:
            own.normal_(0, shape.hidden_size**-0.5)

"""The workloads of a benchmark: one linear, one block or a whole model, with its input."""

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
    """A subject made for one arm, ready to run.

    Args:
        module: what is trained.
        backward: runs forward and backward; gradients are left in `module`.
        forward: runs forward only, and returns its output.
    """

    module: nn.Module
    backward: Callable[[], None]
    forward: Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """A subject of which every arm makes its own.

    Args:
        name: "linear 5461x2048", "block" or "model".
        level: which kind.
        shape: of the model that it is a part of.
        matrix: (out, in) of a linear.
        dtype: "fp32", "bf16" (weights too) or "mixed" (fp32 weights computed in bf16: by autocast
            for a part, by FSDP2's policy for a model).
        sequences: in the batch.
        length: tokens of each.
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
        """Tokens in the batch."""
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
        """Make it on the world's device, with values drawn from torch's global generator.

        Args:
            prepare_: makes an arm of the bare module.
            world: of one process.
            compiled: whether to compile it.
            recompute: `parallel.checkpoint_activations`, of a model.
            layout: `parallel.layout`, of a model.
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
        # Under autocast a linear's input comes from what was computed in bf16.
        autocast = self.dtype == "mixed" and self.level == "linear"
        return self._work(module, world.device, torch.bfloat16 if autocast else DTYPES[self.dtype])

    def on_meta(self, prepare_: Callable[[nn.Module], None]) -> Work:
        """Make it without values, to count operations."""
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
        mixed = self.dtype == "mixed" and device.type != "meta"  # which has no autocast

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
    """Return the subjects of a level: for "linear", each shape of matrix that the model has."""
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
    """Draw every matrix alike, factors included: times do not depend on values that are usual."""
    for p in module.parameters():
        own = local(p)
        if p.ndim == 1:
            own.fill_(1.0)
        else:
            own.normal_(0, shape.hidden_size**-0.5)

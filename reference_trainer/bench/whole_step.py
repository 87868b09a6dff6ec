"""The kernels of the trainer's training step: those of its blocks, and all others."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_

import relora_core as relora
from reference_trainer.activation_checkpointing import checkpointed
from reference_trainer.bench.arms import ARMS
from reference_trainer.bench.kernels import Kernel, repeated
from reference_trainer.bench.launched import Launched, compiling
from reference_trainer.bench.layouts import Step, laid_out, pretended, world_of
from reference_trainer.model.llama import Block, rotary_table
from reference_trainer.model.loss import chunk_loss, chunk_tokens
from reference_trainer.train import forward_backward


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Args:
        name: "blocks", "gathering, embedding, head and loss", or "clipping and optimizer".
        kernels: kernels of the part.
    """

    name: str
    kernels: list[Kernel]


def linear_kernels(arm: str, step: Step, matrix: tuple[int, int]) -> list[Kernel]:
    """Return the kernels of the compiled forward and backward of one linear layer.

    Args:
        arm: name of an arm in `ARMS`.
        step: training step.
        matrix: shape (out, in) of the matrix.
    """
    out, inner = matrix
    with torch.device("meta"):
        module = nn.Sequential(OrderedDict(a_proj=nn.Linear(inner, out, bias=False)))
    return _module_kernels(module, arm, step, inner)


def block_kernels(arm: str, step: Step) -> list[Kernel]:
    """Return the kernels of the compiled forward and backward of one block.

    Args:
        arm: name of an arm in `ARMS`.
        step: training step with the sequences of one micro-step, and its activation checkpointing.
    """
    with torch.device("meta"):
        block = Block(step.shape)
    table = rotary_table(step.length, step.shape, torch.device("cpu"))
    return _module_kernels(block, arm, step, step.shape.hidden_size, *table)


def loss_kernels(step: Step) -> list[Kernel]:
    """Return the kernels of the compiled loss of a micro-step, including its gradient."""
    left, vocabulary = step.sequences * step.length, step.shape.vocab_size
    dtype, found = torch.float32 if step.precision == "fp32" else torch.bfloat16, []
    while left:
        tokens = min(left, chunk_tokens(vocabulary))
        with FakeTensorMode(), compiling() as (backend, compiled):
            z = torch.empty(tokens, vocabulary, dtype=dtype)
            y = torch.empty(tokens, dtype=torch.long)
            torch.compile(chunk_loss, backend=backend, fullgraph=True)(z, y, 1.0, True)
        found += repeated(compiled.kernels, left // tokens)
        left %= tokens
    return found


def as_arm_(module: nn.Module, arm: str, step: Step) -> torch.dtype:
    """Turn a bare module into an arm's module for a step; return the computation's dtype."""
    ARMS[arm](module, step.rank)
    dtype = torch.float32 if step.precision == "fp32" else torch.bfloat16
    if dtype != torch.float32:
        merges = arm == "ours" and step.layout.merged and step.layout.base == "keep"
        kept = relora.keep_merged_(module, dtype=dtype) if merges else []
        for p in module.parameters():
            p.data = p.data if any(p is one for one in kept) else p.data.to(dtype)
    return dtype


def _module_kernels(
    module: nn.Module, arm: str, step: Step, inner: int, *others: Tensor
) -> list[Kernel]:
    dtype = as_arm_(module, arm, step)
    module = checkpointed(module, step.recompute, step.shape)
    memory = FakeTensorMode(allow_non_fake_inputs=True)
    with memory, compiling() as (backend, compiled):
        module.to_empty(device="cpu")
        size = (step.sequences, step.length, inner)
        x = torch.empty(size, dtype=dtype, requires_grad=True)
        output = torch.compile(module, backend=backend, fullgraph=True)(x, *others)
        output.backward(torch.empty_like(output))
    return compiled.kernels


def around_blocks(step: Step, *, processes: int, micro_steps: int) -> list[Part]:
    """Return the kernels of a step outside the blocks; the blocks compute nothing here.

    Args:
        step: training step with the sequences of one micro-step.
        processes: number of processes.
        micro_steps: number of micro-steps whose gradients are accumulated.
    """
    with pretended(processes):
        world = world_of(step.layout)
        memory = FakeTensorMode(allow_non_fake_inputs=True)
        stage = laid_out(step, world, memory=memory)
        for layer in stage.model.model.layers:
            layer.forward = _Nothing(layer)
        stage.model.loss.of_chunk = _no_loss
        parts = step.parts(micro_steps)

        def backward() -> None:
            forward_backward(stage.model, parts, world, step.reduce)

        def update() -> None:
            clip_grad_norm_(stage.parameters.values(), 1.0)
            stage.optimizer.step()
            stage.optimizer.zero_grad()

        with memory:
            backward()  # the first step makes moments and process groups
            update()
            with Launched() as computed:
                backward()
            with Launched() as updated:
                update()
    lost = repeated(loss_kernels(step), micro_steps)
    return [
        Part("gathering, embedding, head and loss", computed.kernels + lost),
        Part("clipping and optimizer", updated.kernels),
    ]


def step_kernels(arm: str, step: Step, *, processes: int, micro_steps: int) -> list[Part]:
    """Return the kernels of a complete step by part, with compiled blocks.

    Args:
        arm: name of an arm in `ARMS`, in the layout of `step`.
        step: training step with the sequences of one micro-step.
        processes: number of processes.
        micro_steps: number of micro-steps whose gradients are accumulated.
    """
    times = step.shape.layers * micro_steps
    blocks = repeated(block_kernels(arm, step), times)
    around = around_blocks(step, processes=processes, micro_steps=micro_steps)
    return [Part("blocks", blocks), *around]


def _no_loss(z: Tensor, y: Tensor, divisor: float, gradient: bool) -> Tensor:
    return torch.empty((), dtype=torch.float32)


class _Nothing:
    """A forward for blocks that launches no kernel but gives trained parameters gradients."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, x: Tensor, *table: Tensor) -> Tensor:
        trained = [p for p in self._layer.parameters() if p.requires_grad]
        output: Tensor = _Silent.apply(x, *trained)  # type: ignore[no-untyped-call]
        return output


class _Silent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype) for t in (x, *trained)]
        return torch.empty(x.shape, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in ctx.like)

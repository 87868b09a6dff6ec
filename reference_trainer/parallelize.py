"""A model laid out over its processes: the steps that build it, in the order they need."""

import hashlib
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from reference_trainer.activation_checkpointing import checkpointed
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import World
from reference_trainer.model.llama import Llama, LlamaShape
from reference_trainer.model.loss import chunk_loss


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the computation."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def compiles(config: ParallelConfig, device: torch.device) -> bool:
    """Whether blocks and loss are compiled: by default on CUDA."""
    return device.type == "cuda" if config.compile is None else config.compile


def build(
    shape: LlamaShape,
    config: ParallelConfig,
    world: World,
    prepare_: Callable[[nn.Module], Collection[nn.Parameter]],
) -> Llama:
    """Return a sharded Llama on the meta device; `to_empty` gives it memory.

    The order matters: parametrize, checkpoint activations, compile, shard, and then make the
    optimizer, because `fully_shard` replaces every Parameter. FSDP2 also runs in a world of one, so
    that there is only one path.

    Args:
        shape: the shape of the model.
        config: precision, compilation and activation checkpointing. Weights are kept in fp32;
            "pure-bf16" keeps trained weights in bf16.
        world: the processes.
        prepare_: a function that is applied to the bare model first, on the meta device. It returns
            the parameters that stay whole on every process, outside FSDP2.
    """
    compiled = compiles(config, world.device)
    if compiled:
        torch.compiler.reset()  # or a phase's graphs would depend on earlier phases
    with torch.device("meta"):
        model = Llama(shape)
    whole = set(prepare_(model))
    if config.precision == "pure-bf16":  # a frozen W stays in fp32, or merges into it would be lost
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.bfloat16()
    layers = model.model.layers
    for index, block in enumerate(layers):
        layers[index] = checkpointed(block, config.checkpoint_activations, shape)
        if compiled:
            layers[index].compile()
    if compiled:
        model.loss.of_chunk = torch.compile(chunk_loss)

    dtype = compute_dtype(config, world.device)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary table stays in fp32
    )
    for module in (*layers, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy, ignored_params=whole)
        if world.device.type == "cpu":  # in torch 2.8, gloo silently sums instead of averaging
            module.set_force_sum_reduction_for_comms(True)
    return model


@torch.no_grad()
def init_weights_(named: dict[str, Tensor], *, hidden_size: int, seed: int) -> None:
    """Set norms to one and matrices to normal draws of standard deviation 1 / sqrt(hidden size).

    That is 0.022 at the width of 1.3b, where Llamas usually have 0.02; with 0.02 at a width of
    256 a model learns much more slowly. Each weight is drawn whole on the CPU, keyed by (seed,
    name), and every process keeps its part. So a draw is the same at every world size.

    Args:
        named: parameters by plain name, sharded or not, changed in place.
        hidden_size: the hidden size of the model.
        seed: the seed of the draws.
    """
    for name, parameter in named.items():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        digest = hashlib.blake2b(f"{seed}/init/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        whole = torch.empty(parameter.shape).normal_(0, hidden_size**-0.5, generator=generator)
        copy_whole_(parameter, whole)


@torch.no_grad()
def rows_of(whole: Tensor, world: World) -> Tensor:
    """Return `whole`, which every process holds, sharded by rows over the processes."""
    placements = [Shard(0)] * world.mesh.ndim
    rows = distribute_tensor(whole, world.mesh, placements, src_data_rank=None)
    return rows.clone()  # so that the whole can be freed


@torch.no_grad()
def copy_whole_(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` this process's part of `whole`, which every process holds."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    target.copy_(whole)

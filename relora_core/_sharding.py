"""How a tensor is spread over processes. The only file that names DTensor or FSDP."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over processes."""
    return isinstance(tensor, DTensor)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to `model` or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharding(tensor: Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """Return what two tensors share if their parts lie on the same processes; None if whole.

    It is the mesh and those of its dimensions, of two processes or more, over which the tensor is
    split.
    """
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    # Not is_shard(): the strided shards of FSDP2 over tensor parallelism deny it.
    split = [
        d for d, p in enumerate(tensor.placements) if not p.is_replicate() and mesh.size(d) > 1
    ]
    return (mesh, tuple(split)) if split else None


def shard_sum(counts: Tensor, like: Tensor | None) -> Tensor:
    """Add `counts` up, in place, over the processes that `like` is split over."""
    split = None if like is None else sharding(like)
    if split is not None:
        mesh, dims = split
        for dim in dims:
            dist.all_reduce(counts, group=mesh.get_group(dim))
    return counts


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank: one all-gather if sharded, else `tensor` itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated(tensor: Tensor) -> Tensor:
    """Return the whole tensor as one that computes with sharded ones; differentiable."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def row_parts(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return this rank's rows of W and of B, and A whole; None if W is sharded, but not by rows.

    A whole W beside sharded factors (left out of FSDP by `ignored_params`) has all rows here.
    """
    if not isinstance(W, DTensor):
        return W, full(B), full(A)
    assert isinstance(B, DTensor)
    by_rows = all(p.is_replicate() or p.is_shard(0) for p in W.placements)
    if not by_rows or B.placements != W.placements:
        return None
    return W.to_local(), B.to_local(), full(A)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor`, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which every rank holds its `part`, sharded as `like`."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of `whole` that this rank holds of `like`. No communication."""
    whole = whole.to(like.device, non_blocking=True)
    if not isinstance(like, DTensor):
        return whole
    placed = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()


@torch.no_grad()
def copy_from_full_(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` the part of `whole` that this rank holds. No communication."""
    local(target).copy_(local_part(whole, target))


def reshard_(model: nn.Module) -> None:
    """Make every FSDP2 module of `model` hold its shards again.

    After a forward without backward, the root's parameters (and, with
    `reshard_after_forward=False`, all of them) are gathered copies, and a write to a copy is
    lost when FSDP drops it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

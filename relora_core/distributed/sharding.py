"""Operations on tensors that may be sharded over processes; a plain tensor counts as whole.

The operations on DTensors are in `dtensor.py`, which is imported with the first DTensor.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relora_core.distributed.local import is_sharded, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def sharers(model: nn.Module) -> list[int]:
    """Return the process ranks that share `model`; empty if nothing shows that it is shared."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return sorted(dist.get_process_group_ranks(module.process_group))
    meshes = [cast("DTensor", p).device_mesh for p in model.parameters() if is_sharded(p)]
    largest = max(meshes, key=lambda mesh: mesh.size(), default=None)
    return [] if largest is None else sorted(largest.mesh.flatten().tolist())


def sharding(tensor: Tensor) -> "tuple[DeviceMesh, tuple[int, ...]] | None":
    """Return a key that is equal for tensors split over the same processes; None if whole.

    The key is the mesh and the mesh dimensions, of two processes or more, that split the tensor.
    """
    if not is_sharded(tensor):
        return None
    sharded = cast("DTensor", tensor)
    mesh = sharded.device_mesh
    # Not is_shard(), which is False for the strided shards of FSDP2 over tensor parallelism.
    split = [
        d for d, p in enumerate(sharded.placements) if not p.is_replicate() and mesh.size(d) > 1
    ]
    return (mesh, tuple(split)) if split else None


def shard_sum(counts: Tensor, like: Tensor | None) -> Tensor:
    """Sum `counts`, in place, over the processes that `like` is split over."""
    return _reduced(counts, like, dist.ReduceOp.SUM)


def shard_max(values: Tensor, like: Tensor) -> Tensor:
    """Take the maximum of `values`, in place, over the processes that `like` is split over."""
    return _reduced(values, like, dist.ReduceOp.MAX)


def _reduced(values: Tensor, like: Tensor | None, operation: Any) -> Tensor:
    split = None if like is None else sharding(like)
    if split is not None:
        mesh, dims = split
        for dim in dims:
            dist.all_reduce(values, operation, group=mesh.get_group(dim))
    return values


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every process: one all-gather if sharded, else `tensor` itself.

    Raises:
        ValueError: if this version of torch would assemble the shards in the wrong order.
    """
    if not is_sharded(tensor):
        return tensor
    from relora_core.distributed import dtensor

    return dtensor.full(tensor)


def replicated(tensor: Tensor) -> Tensor:
    """Return the tensor, replicated over its mesh if it is a DTensor; differentiable."""
    if not is_sharded(tensor):
        return tensor
    from relora_core.distributed import dtensor

    return dtensor.replicated(tensor)


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole`, which every process holds, replicated on the mesh of a sharded `like`."""
    if not is_sharded(like):
        return whole
    from relora_core.distributed import dtensor

    return dtensor.spread_like(whole, like)


def new_factors(W: Tensor, rank: int, batch_dims: int) -> tuple[Tensor, Tensor]:
    """Return empty A, `(rank, in)`, and B, `(out, rank)`, split where tensor parallelism splits W.

    If W is split by rows, B is; if by columns, A is. For a bank, both start with its `batch_dims`
    leading dimensions.
    """
    bank, (out, *inner) = W.shape[:batch_dims], W.shape[batch_dims:]
    A = (*bank, rank, math.prod(inner))
    B = (*bank, out, rank)
    if not is_sharded(W):
        return W.new_empty(A), W.new_empty(B)
    from relora_core.distributed import dtensor

    return dtensor.new_factors(W, A, B)


def split_dim(W: Tensor) -> int | None:
    """Return the dimension of W that tensor parallelism splits, if its mesh is 1D; else None."""
    if not is_sharded(W):
        return None
    from relora_core.distributed import dtensor

    return dtensor.split_dim(W)


def sharded_rows(whole: Tensor, mesh: "DeviceMesh") -> Tensor:
    """Return `whole`, which every process has, sharded by rows as FSDP2 shards over `mesh`."""
    from relora_core.distributed import dtensor

    return dtensor.sharded_rows(whole, mesh)


def parts(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return this process's block of W, the block's rows of B and its columns of A, `(rank, ...)`.

    Only the missing parts of B and A are gathered; for a bank split by its matrices, nothing is.
    A whole W with sharded factors (W left out of FSDP by `ignored_params`) is one block.
    """
    if not is_sharded(W):
        return W, full(B), full(A)
    from relora_core.distributed import dtensor

    return dtensor.parts(W, B, A)


def row_parts(W: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return this process's rows of W, whole or split by rows, and the same rows of B."""
    if not is_sharded(W):
        return W, full(B)
    from relora_core.distributed import dtensor

    return dtensor.row_parts(W, B)


def split_once(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return B, `(out, rank)`, and A, `(rank, ...)`, of `parts`, split wherever W is split.

    A factor that W's processes hold in common is divided among them, without communication. If W
    is split by rows and columns, the processes of one row or column keep holding it in common.
    """
    if not is_sharded(W):
        return B, A.view(A.shape[0], *W.shape[1:])
    from relora_core.distributed import dtensor

    return dtensor.split_once(W, B, A)


def sharded_like(part: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return one tensor, laid out as `like`, from the `part` of each process.

    `shape` is the shape of the whole tensor; if None, that of `like`.
    """
    if not is_sharded(like):
        return part
    from relora_core.distributed import dtensor

    return dtensor.sharded_like(part, like, shape)


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of `whole`, laid out as `like`. No communication."""
    whole = whole.to(like.device, non_blocking=True)
    if not is_sharded(like):
        return whole
    from relora_core.distributed import dtensor

    return dtensor.local_part(whole, like)


@torch.no_grad()
def copy_from_full_(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` the part of `whole` that this process holds. No communication."""
    local(target).copy_(local_part(whole, target))


@torch.no_grad()
def copy_rows_(target: Tensor, rows: Tensor, like: Tensor) -> None:
    """Copy this process's `rows` into `target`, which has as many rows in all as `like`.

    Args:
        target: the tensor to change, whole or sharded by rows. If it is whole and `like` is
            sharded, this takes a gather.
        rows: the rows that this process holds in the layout of `like`.
        like: a matrix, whole or sharded by rows.
    """
    copy_all_(((target, rows, like),))


@torch.no_grad()
def copy_all_(copies: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Apply `copy_rows_` to each (target, rows, like); gathers in one layout share a collective."""
    targets, sharded = [], []
    for target, rows, like in copies:
        if is_sharded(like) and not is_sharded(target):
            targets.append(target)
            sharded.append(sharded_like(rows, like, (like.shape[0], rows.shape[1])))
        else:
            both = is_sharded(target) and not is_sharded(like)
            local(target).copy_(local_part(rows, target) if both else rows)
    for target, whole in zip(targets, gathered(sharded, targets), strict=True):
        if whole is not target:
            target.copy_(whole)


def gathered(tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return every tensor whole; tensors with the same row sharding share one all-gather.

    Args:
        tensors: the tensors, sharded or not.
        into: a tensor for each result, if given. A tensor that is whole already is not copied.
    """
    if not any(map(is_sharded, tensors)):
        return list(tensors)
    from relora_core.distributed import dtensor

    return dtensor.gathered(tensors, into)

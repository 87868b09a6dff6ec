"""Operations on tensors that may be spread over processes; a plain tensor is its own whole.

Those on DTensors lie in `dtensor.py`, and are imported with the first one.
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
    """Return the ranks of the processes that share `model`; empty if there is no sign of any."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return sorted(dist.get_process_group_ranks(module.process_group))
    meshes = [cast("DTensor", p).device_mesh for p in model.parameters() if is_sharded(p)]
    largest = max(meshes, key=lambda mesh: mesh.size(), default=None)
    return [] if largest is None else sorted(largest.mesh.flatten().tolist())


def sharding(tensor: Tensor) -> "tuple[DeviceMesh, tuple[int, ...]] | None":
    """Return what two tensors share if their parts lie on the same processes; None if whole.

    It is the mesh and those of its dimensions, of two processes or more, over which the tensor is
    split.
    """
    if not is_sharded(tensor):
        return None
    sharded = cast("DTensor", tensor)
    mesh = sharded.device_mesh
    # Not is_shard(): the strided shards of FSDP2 over tensor parallelism deny it.
    split = [
        d for d, p in enumerate(sharded.placements) if not p.is_replicate() and mesh.size(d) > 1
    ]
    return (mesh, tuple(split)) if split else None


def shard_sum(counts: Tensor, like: Tensor | None) -> Tensor:
    """Add `counts` up, in place, over the processes that `like` is split over."""
    return _reduced(counts, like, dist.ReduceOp.SUM)


def shard_max(values: Tensor, like: Tensor) -> Tensor:
    """Take the largest of `values`, in place, over the processes that `like` is split over."""
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
        ValueError: where torch would put its parts together in another order.
    """
    if not is_sharded(tensor):
        return tensor
    from relora_core.distributed import dtensor

    return dtensor.full(tensor)


def replicated(tensor: Tensor) -> Tensor:
    """Return the whole tensor as one that computes with sharded ones; differentiable."""
    if not is_sharded(tensor):
        return tensor
    from relora_core.distributed import dtensor

    return dtensor.replicated(tensor)


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole`, which every process has, as a DTensor on the mesh of a sharded `like`."""
    if not is_sharded(like):
        return whole
    from relora_core.distributed import dtensor

    return dtensor.spread_like(whole, like)


def new_factors(W: Tensor, rank: int, batch_dims: int) -> tuple[Tensor, Tensor]:
    """Return empty A, `(rank, in)`, and B, `(out, rank)`, split where tensor parallelism splits W.

    Where it splits W's rows it splits B's, and where W's columns A's. Of a bank, both have its
    `batch_dims` leading dimensions before.
    """
    bank, (out, *inner) = W.shape[:batch_dims], W.shape[batch_dims:]
    A = (*bank, rank, math.prod(inner))
    B = (*bank, out, rank)
    if not is_sharded(W):
        return W.new_empty(A), W.new_empty(B)
    from relora_core.distributed import dtensor

    return dtensor.new_factors(W, A, B)


def split_dim(W: Tensor) -> int | None:
    """Return the dimension that tensor parallelism splits W over, on a mesh of one dimension."""
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

    Only what is not here yet of B and A is gathered; of a bank that is split by its matrices,
    nothing. A whole W beside sharded factors (left out of FSDP by `ignored_params`) is one block.
    """
    if not is_sharded(W):
        return W, full(B), full(A)
    from relora_core.distributed import dtensor

    return dtensor.parts(W, B, A)


def row_parts(W: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return this process's rows of a W that is whole or split by rows, and those rows of B."""
    if not is_sharded(W):
        return W, full(B)
    from relora_core.distributed import dtensor

    return dtensor.row_parts(W, B)


def split_once(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return B, `(out, rank)`, and A, `(rank, ...)`, of `parts`, split wherever W is.

    What W's processes hold in common of a factor is divided among them, without communication; but
    where W is split by rows and by columns, those of one row or column keep it in common.
    """
    if not is_sharded(W):
        return B, A.view(A.shape[0], *W.shape[1:])
    from relora_core.distributed import dtensor

    return dtensor.split_once(W, B, A)


def sharded_like(part: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return the tensor of `shape`, `like`'s if None, of which every process holds its `part`."""
    if not is_sharded(like):
        return part
    from relora_core.distributed import dtensor

    return dtensor.sharded_like(part, like, shape)


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of `whole` that this process holds of `like`. No communication."""
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
    """Copy `rows` into `target`, which has the rows of `like`; each whole or sharded by rows.

    Args:
        target: what is changed; whole beside a sharded `like`, it takes a gather.
        rows: of all its rows those that this process holds of `like`.
        like: a matrix.
    """
    copy_all_(((target, rows, like),))


@torch.no_grad()
def copy_all_(copies: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Do what `copy_rows_` does for each (target, rows, like); gathers alike are one collective."""
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
    """Return every tensor whole; those that are split by rows alike share one all-gather.

    Args:
        tensors: sharded or not.
        into: where each is put, if given; of a whole one nothing is copied.
    """
    if not any(map(is_sharded, tensors)):
        return list(tensors)
    from relora_core.distributed import dtensor

    return dtensor.gathered(tensors, into)

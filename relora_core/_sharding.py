"""How a tensor is spread over processes. The only file that names DTensor or FSDP."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

_APART = (
    "W is sharded and its factors are not: shard them with it, or leave W out of FSDP2 too "
    "(ignored_params)"
)
# Seen in 2.8, and not in 2.13.
_MISPLACES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over processes."""
    return isinstance(tensor, DTensor)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to `model` or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def fsdp_owns(module: nn.Module) -> bool:
    """Whether `fully_shard` of `module`, or of one around it, shards `module`'s own parameters.

    While they are gathered, nothing at `module` tells them from plain ones: FSDP2 has to be asked.
    """
    states = [reference() for reference in _module_state_mapping.values()]
    return any(
        parameter._module_info.module is module
        for state in states
        if isinstance(state, FSDPState)
        for group in parameter_groups(state)
        for parameter in group.fsdp_params
    )


def unreduced_gradients(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of those modules of whose parameters FSDP2 keeps gradients to be reduced yet.

    They are whole, and in no `grad`: `set_requires_gradient_sync(False)` accumulates them so.
    """
    wanted, found = set(map(id, modules)), set()
    for reference in list(_module_state_mapping.values()):
        state = reference()
        for group in parameter_groups(state) if isinstance(state, FSDPState) else ():
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                waits = getattr(parameter, "unsharded_accumulated_grad", None) is not None
                waits = waits or (whole is not None and whole.grad is not None)
                if waits and id(parameter._module_info.module) in wanted:
                    found.add(id(parameter._module_info.module))
    return found


def is_flat(model: nn.Module) -> bool:
    """Whether FSDP1 keeps parameters of `model` in flat ones."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def parameter_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of an FSDP2 module's state."""
    several = getattr(state, "_fsdp_param_groups", None)  # of newer torch
    if several is not None:
        return list(several)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether `parallelize_module` has split `module`'s own parameters, and nothing has since."""
    applied = getattr(module, "_distribute_module_applied", False)
    return bool(applied) and all(mesh_dims(p) <= 1 for p in module.parameters(recurse=False))


def sharers(model: nn.Module) -> list[int]:
    """Return the ranks of the processes that share `model`; empty if there is no sign of any."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return sorted(dist.get_process_group_ranks(module.process_group))
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    largest = max(meshes, key=lambda mesh: mesh.size(), default=None)
    return [] if largest is None else sorted(largest.mesh.flatten().tolist())


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
    """Return the whole tensor on every rank: one all-gather if sharded, else `tensor` itself.

    Raises:
        ValueError: where torch would put its parts together in another order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    strided = {p.dim for p in tensor.placements if isinstance(p, _StridedShard)}
    for dim in strided if _MISPLACES else ():
        sizes = [
            tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if _dim(p) == dim
        ]
        if tensor.shape[dim] % math.prod(sizes):
            over = " x ".join(map(str, sizes))
            raise ValueError(
                f"torch {torch.__version__} gathers shards of FSDP2 over tensor parallelism "
                f"rightly only if they are even; got {tensor.shape[dim]} rows over {over} "
                "processes: use torch 2.13, or a width that they divide"
            )
    return tensor.full_tensor()


def replicated(tensor: Tensor) -> Tensor:
    """Return the whole tensor as one that computes with sharded ones; differentiable."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole`, which every process has, as a DTensor on the mesh of a sharded `like`."""
    if not isinstance(like, DTensor):
        return whole
    placements = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(whole, like.device_mesh, placements, run_check=False)


def new_factors(W: Tensor, rank: int, batch_dims: int) -> tuple[Tensor, Tensor]:
    """Return empty A, `(rank, in)`, and B, `(out, rank)`, split where tensor parallelism splits W.

    Where it splits W's rows it splits B's, and where W's columns A's. Of a bank, both have its
    `batch_dims` leading dimensions before.
    """
    bank, (out, *inner) = W.shape[:batch_dims], W.shape[batch_dims:]
    A = (*bank, rank, math.prod(inner))
    B = (*bank, out, rank)
    if not isinstance(W, DTensor):
        return W.new_empty(A), W.new_empty(B)
    rows, columns = _along(W)
    return _empty_like(W, A, columns), _empty_like(W, B, rows)


def _empty_like(W: DTensor, shape: tuple[int, ...], placements: list[Placement]) -> Tensor:
    whole = torch.empty(shape, dtype=W.dtype, device="meta")
    placed = distribute_tensor(whole, W.device_mesh, placements, src_data_rank=None)
    return torch.empty_like(placed, device=W.device)


def _along(W: DTensor, batch_dims: int = 0) -> tuple[list[Placement], list[Placement]]:
    """Return how B and A lie where W does: B has its rows, A its columns, both its matrices."""
    dims = [_dim(p) for p in W.placements]
    both = list(zip(dims, W.placements, strict=True))
    rows = [p if dim is not None and dim <= batch_dims else Replicate() for dim, p in both]
    columns = [Replicate() if dim in (None, batch_dims) else p for dim, p in both]
    return rows, columns


def split_dim(W: Tensor) -> int | None:
    """Return the dimension that tensor parallelism splits W over, on a mesh of one dimension."""
    assert isinstance(W, DTensor)
    return _dim(W.placements[0]) if W.device_mesh.ndim == 1 else None


def once(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor` on one process and zero on the others, to be summed over them.

    Each has the gradient of the sum, so that it needs no summing.
    """
    assert isinstance(tensor, DTensor)
    whole = tensor.to_local()
    return whole if tensor.device_mesh.get_local_rank() == 0 else whole - whole.detach()


def summing(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor`, its gradient being the sum of what the processes compute."""
    whole = replicated(tensor)
    assert isinstance(whole, DTensor)
    return whole.to_local(grad_placements=[Partial()])


def summed(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor`, whose gradient is left to be summed by what made it."""
    assert isinstance(tensor, DTensor)
    whole = tensor if all(p.is_replicate() for p in tensor.placements) else replicated(tensor)
    assert isinstance(whole, DTensor)
    return whole.to_local(grad_placements=[Partial()])


def last_split(tensor: Tensor) -> Tensor:
    """Return this process's part of `tensor` along the last dimension."""
    assert isinstance(tensor, DTensor)
    return tensor.redistribute(placements=[Shard(tensor.ndim - 1)]).to_local()


def columns_of(y: Tensor, W: Tensor) -> Tensor:
    """Return the output of which every process holds the columns of its rows of W."""
    assert isinstance(W, DTensor)
    return _from_part(y, W.device_mesh, [Shard(y.ndim - 1)], [*y.shape[:-1], W.shape[0]])


def parts_of_sum(y: Tensor, W: Tensor) -> Tensor:
    """Return the output that is the sum of every process's `y`."""
    assert isinstance(W, DTensor)
    return DTensor.from_local(y, W.device_mesh, [Partial()], run_check=False)


def parts(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's block of W, the block's rows of B and its columns of A, `(rank, ...)`.

    Only what is not here yet of B and A is gathered; of a bank that is split by its matrices,
    nothing. A whole W beside sharded factors (left out of FSDP by `ignored_params`) is one block.
    """
    if not isinstance(W, DTensor):
        return W, full(B), full(A)
    if not isinstance(A, DTensor) or not isinstance(B, DTensor):
        raise ValueError(_APART)
    batch_dims = B.ndim - 2
    rows, columns = _along(W, batch_dims)
    if batch_dims:
        return W.to_local(), _placed(B, rows), _placed(A, columns)
    if W.ndim > 2 and any(_dim(p) not in (None, 0) for p in W.placements):
        A = replicated(A).view(A.shape[0], *W.shape[1:])  # so that its columns split as W's do
    return W.to_local(), _placed(B, rows), _placed(A, columns).flatten(1)


def row_parts(W: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's rows of a W that is whole or split by rows, and those rows of B."""
    if not isinstance(W, DTensor):
        return W, full(B)
    if not isinstance(B, DTensor):
        raise ValueError(_APART)
    return W.to_local(), _placed(B, list(W.placements))


def split_once(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return B, `(out, rank)`, and A, `(rank, ...)`, of `parts`, split wherever W is.

    What W's processes hold in common of a factor is divided among them, without communication; but
    where W is split by rows and by columns, those of one row or column keep it in common.
    """
    if not isinstance(W, DTensor):
        return B, A.view(A.shape[0], *W.shape[1:])
    rows, columns = _along(W)
    inner, mesh = W.to_local().shape[1:], W.device_mesh
    whole_B = _from_part(B, mesh, rows, (W.shape[0], B.shape[1]))
    whole_A = _from_part(A.view(A.shape[0], *inner), mesh, columns, (A.shape[0], *W.shape[1:]))
    return (
        whole_B.redistribute(placements=_divided(rows, W, 0)),
        whole_A.redistribute(placements=_divided(columns, W, 1)),
    )


def _divided(placements: list[Placement], W: DTensor, dim: int) -> list[Placement]:
    if any(not p.is_replicate() for p in placements):
        return placements
    both = zip(placements, W.placements, strict=True)
    return [p if w.is_replicate() else Shard(dim) for p, w in both]


def _dim(placement: Placement) -> int | None:
    # Not is_shard(): the strided shards of FSDP2 over tensor parallelism deny it.
    return getattr(placement, "dim", None)


def _placed(tensor: Tensor, placements: list[Placement]) -> Tensor:
    assert isinstance(tensor, DTensor)
    if tuple(placements) != tensor.placements:
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def mesh_dims(tensor: Tensor) -> int:
    """Return over how many dimensions of a mesh `tensor` is laid: 0 for a plain one."""
    return tensor.device_mesh.ndim if isinstance(tensor, DTensor) else 0


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor`, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(part: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return the tensor of `shape`, `like`'s if None, of which every rank holds its `part`."""
    if not isinstance(like, DTensor):
        return part
    if shape is not None:
        return _from_part(part, like.device_mesh, like.placements, shape)
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _from_part(
    part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of `whole` that this rank holds of `like`. No communication."""
    whole = whole.to(like.device, non_blocking=True)
    if not isinstance(like, DTensor):
        return whole
    placed = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local().to(like.device)  # FSDP2's CPU offload: not the mesh's device


@torch.no_grad()
def copy_from_full_(target: Tensor, whole: Tensor) -> None:
    """Copy into `target` the part of `whole` that this rank holds. No communication."""
    local(target).copy_(local_part(whole, target))


def sharded_rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return `whole`, which every process has, sharded by rows as FSDP2 shards over `mesh`."""
    placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)


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
        if isinstance(like, DTensor) and not isinstance(target, DTensor):
            shape = (like.shape[0], rows.shape[1])
            targets.append(target)
            sharded.append(_from_part(rows, like.device_mesh, like.placements, shape))
        else:
            both = isinstance(target, DTensor) and not isinstance(like, DTensor)
            local(target).copy_(local_part(rows, target) if both else rows)
    for target, whole in zip(targets, gathered(sharded, targets), strict=True):
        if whole is not target:
            target.copy_(whole)


@torch.no_grad()
def gathered(tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return every tensor whole; those that are split by rows alike share one all-gather.

    Args:
        tensors: sharded or not.
        into: where each is put, if given; of a whole one nothing is copied.
    """
    found = list(tensors)
    together: dict[object, list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike = _rows_alike(tensor)
        if alike is None:
            found[index] = full(tensor)
        else:
            together.setdefault((*alike, tensor.dtype, tensor.device), []).append(index)
    for members in together.values():
        parts = [tensors[index] for index in members]
        places = [
            into[index] if into else torch.empty(p.shape, dtype=p.dtype, device=local(p).device)
            for index, p in zip(members, parts, strict=True)
        ]
        _gather_rows_(places, parts)
        for index, place in zip(members, places, strict=True):
            found[index] = place
    return found


def _rows_alike(tensor: Tensor) -> tuple[DeviceMesh, int] | None:
    """Return the dimension of a mesh over which alone a tensor is split, by rows; else None."""
    if not isinstance(tensor, DTensor):
        return None
    split = [d for d, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(split) != 1 or type(tensor.placements[split[0]]) is not Shard:
        return None
    return (tensor.device_mesh, split[0]) if _dim(tensor.placements[split[0]]) == 0 else None


def _gather_rows_(targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Gather tensors that `_rows_alike` says the same of, padded to as many rows of each rank."""
    alike = _rows_alike(tensors[0])
    assert alike is not None
    mesh, dim = alike
    processes = mesh.size(dim)
    own = [local(tensor) for tensor in tensors]
    if processes == 1:
        for target, part in zip(targets, own, strict=True):
            target.copy_(part)
        return
    rows = [-(-tensor.shape[0] // processes) for tensor in tensors]
    sizes = [count * part.shape[1:].numel() for count, part in zip(rows, own, strict=True)]
    sent = own[0].new_empty(sum(sizes))
    for place, part in zip(torch.split(sent, sizes), own, strict=True):
        place[: part.numel()].copy_(part.flatten())
    assert isinstance(tensors[0], DTensor)
    together = _from_part(sent, mesh, tensors[0].placements, (processes * sent.numel(),))
    received = together.full_tensor()
    places = torch.split(received.view(processes, -1), sizes, dim=1)
    for target, place, part in zip(targets, places, own, strict=True):
        whole = place.reshape(-1, *part.shape[1:])
        target.copy_(whole[: target.shape[0]])


def reshard_owners_(modules: Iterable[nn.Module]) -> None:
    """Make the FSDP2 modules that own parameters of `modules` hold their shards again."""
    wanted = set(map(id, modules))
    for owner, reference in list(_module_state_mapping.items()) if wanted else ():
        state = reference()
        groups = parameter_groups(state) if isinstance(state, FSDPState) else []
        owned = (id(p._module_info.module) for group in groups for p in group.fsdp_params)
        if isinstance(owner, FSDPModule) and not wanted.isdisjoint(owned):
            owner.reshard()


def reshard_(model: nn.Module) -> None:
    """Make every FSDP2 module of `model` hold its shards again.

    After a forward without backward, the root's parameters (and, with
    `reshard_after_forward=False`, all of them) are gathered copies, and a write to a copy is
    lost when FSDP drops it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

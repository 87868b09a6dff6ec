"""Operations on DTensors, imported with the first DTensor: the import takes half a second."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from relora_core._torch_private import is_strided_shard
from relora_core.distributed.local import is_sharded, local

_APART = (
    "W is sharded and its factors are not: shard them with it, or leave W out of FSDP2 too "
    "(ignored_params)"
)
# `full_tensor` puts rows in the wrong place in torch 2.8, and no longer in 2.13.
_MISPLACES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every process, by one all-gather.

    Raises:
        ValueError: if this version of torch would assemble the shards in the wrong order.
    """
    assert isinstance(tensor, DTensor)
    strided = {_dim(p) for p in tensor.placements if is_strided_shard(p)}
    for dim in strided if _MISPLACES else ():
        assert dim is not None
        sizes = [
            tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if _dim(p) == dim
        ]
        if tensor.shape[dim] % math.prod(sizes):
            over = " x ".join(map(str, sizes))
            raise ValueError(
                f"torch {torch.__version__} gathers shards of FSDP2 over tensor parallelism "
                f"correctly only if they are even; got {tensor.shape[dim]} rows over {over} "
                "processes: use torch 2.13, or a width divisible by their number"
            )
    return tensor.full_tensor()


def replicated(tensor: Tensor) -> Tensor:
    """Return `tensor` replicated over its mesh; differentiable."""
    assert isinstance(tensor, DTensor)
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole`, which every process holds, as a replicated DTensor on the mesh of `like`."""
    assert isinstance(like, DTensor)
    placements = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(whole, like.device_mesh, placements, run_check=False)


def new_factors(W: Tensor, A: tuple[int, ...], B: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return empty A and B of these shapes, split as W is: see `_sharding.new_factors`."""
    assert isinstance(W, DTensor)
    rows, columns = _along(W)
    return _empty_like(W, A, columns), _empty_like(W, B, rows)


def _empty_like(W: DTensor, shape: tuple[int, ...], placements: list[Placement]) -> Tensor:
    whole = torch.empty(shape, dtype=W.dtype, device="meta")
    placed = distribute_tensor(whole, W.device_mesh, placements, src_data_rank=None)
    return torch.empty_like(placed, device=W.device)


def _along(W: DTensor, batch_dims: int = 0) -> tuple[list[Placement], list[Placement]]:
    """Return placements of B, split like W's rows, and A, like its columns; a bank splits both."""
    dims = [_dim(p) for p in W.placements]
    both = list(zip(dims, W.placements, strict=True))
    rows = [p if dim is not None and dim <= batch_dims else Replicate() for dim, p in both]
    columns = [Replicate() if dim in (None, batch_dims) else p for dim, p in both]
    return rows, columns


def split_dim(W: Tensor) -> int | None:
    """Return the dimension of W that tensor parallelism splits, if its mesh is 1D; else None."""
    assert isinstance(W, DTensor)
    return _dim(W.placements[0]) if W.device_mesh.ndim == 1 else None


def once(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor` on one process and zero on the others, for a later sum.

    Every process receives the gradient of the sum, so the gradient needs no reduction.
    """
    assert isinstance(tensor, DTensor)
    whole = tensor.to_local()
    return whole if tensor.device_mesh.get_local_rank() == 0 else whole - whole.detach()


def summing(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor`; its gradient is summed over the processes."""
    whole = replicated(tensor)
    assert isinstance(whole, DTensor)
    return whole.to_local(grad_placements=[Partial()])


def summed(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor`; the operation that produced it sums its gradient."""
    assert isinstance(tensor, DTensor)
    whole = tensor if all(p.is_replicate() for p in tensor.placements) else replicated(tensor)
    assert isinstance(whole, DTensor)
    return whole.to_local(grad_placements=[Partial()])


def last_split(tensor: Tensor) -> Tensor:
    """Return this process's part of `tensor`, split along its last dimension."""
    assert isinstance(tensor, DTensor)
    return tensor.redistribute(placements=[Shard(tensor.ndim - 1)]).to_local()


def columns_of(y: Tensor, W: Tensor) -> Tensor:
    """Return the output as a DTensor; each process holds the columns that its rows of W give."""
    assert isinstance(W, DTensor)
    return _from_part(y, W.device_mesh, [Shard(y.ndim - 1)], [*y.shape[:-1], W.shape[0]])


def parts_of_sum(y: Tensor, W: Tensor) -> Tensor:
    """Return the output as a DTensor: the sum of every process's `y`."""
    assert isinstance(W, DTensor)
    return DTensor.from_local(y, W.device_mesh, [Partial()], run_check=False)


def parts(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return this process's blocks of W, B and A: see `_sharding.parts`."""
    assert isinstance(W, DTensor)
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
    """Return this process's rows of W and B."""
    assert isinstance(W, DTensor)
    if not isinstance(B, DTensor):
        raise ValueError(_APART)
    return W.to_local(), _placed(B, list(W.placements))


def split_once(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A, each split wherever W is split: see `_sharding.split_once`."""
    assert isinstance(W, DTensor)
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
    # Not is_shard(), which is False for the strided shards of FSDP2 over tensor parallelism.
    return getattr(placement, "dim", None)


def _placed(tensor: Tensor, placements: list[Placement]) -> Tensor:
    assert isinstance(tensor, DTensor)
    if tuple(placements) != tensor.placements:
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def sharded_like(part: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return one tensor, laid out as `like`, from the `part` of each process.

    `shape` is the shape of the whole tensor; if None, that of `like`.
    """
    assert isinstance(like, DTensor)
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
    """Return this process's part of `whole`, laid out as `like`. No communication."""
    assert isinstance(like, DTensor)
    placed = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local().to(like.device)  # not the mesh's device under FSDP2's CPU offload


def sharded_rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return `whole`, which every process has, sharded by rows as FSDP2 shards over `mesh`."""
    placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)


@torch.no_grad()
def gathered(tensors: Sequence[Tensor], into: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the tensors whole, gathering the sharded ones: see `_sharding.gathered`."""
    found = list(tensors)
    together: dict[object, list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike = _rows_alike(tensor)
        if alike is None:
            found[index] = full(tensor) if is_sharded(tensor) else tensor
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
    """Return the mesh and its only dimension that splits the tensor, if by rows; else None."""
    if not isinstance(tensor, DTensor):
        return None
    split = [d for d, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(split) != 1 or type(tensor.placements[split[0]]) is not Shard:
        return None
    return (tensor.device_mesh, split[0]) if _dim(tensor.placements[split[0]]) == 0 else None


def _gather_rows_(targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Gather tensors with equal `_rows_alike`, padded to the same number of rows per process."""
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

"""A process's own part of a tensor, which may be a DTensor."""

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from relora_core._torch_private import is_split_by_hand

if TYPE_CHECKING:  # importing it takes half a second
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, spread over processes."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of `tensor`, sharing its memory."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def mesh_dims(tensor: Tensor) -> int:
    """Return the number of dimensions of `tensor`'s mesh; 0 for a plain tensor."""
    return cast("DTensor", tensor).device_mesh.ndim if is_sharded(tensor) else 0


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether `parallelize_module`, and nothing after it, has split `module`'s own parameters."""
    own = module.parameters(recurse=False)
    return is_split_by_hand(module) and all(mesh_dims(p) <= 1 for p in own)

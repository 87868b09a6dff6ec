"""Every use of torch's private names, each with the reason why no public name suffices.

Torch 2.8 to 2.13 are tested; names that a later version moves are to be fixed here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

# Convolutions of 1 to 3 dimensions and their transposes have no public parent.
CONVOLUTION = _ConvNd

# A context that sees every operation is a public class in a private module.
DispatchMode = TorchDispatchMode

# The public `F.grouped_mm` (2.10 and later) reaches `__torch_function__` as this function.
grouped_mm = torch._grouped_mm


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor wraps other tensors; quantized tensors share no public class."""
    return is_traceable_wrapper_subclass(tensor)


def is_exporting() -> bool:
    """Whether `torch.export` traces; up to 2.11 the public function is true for any compilation."""
    return bool(torch.compiler._is_exporting_flag)


def is_tracing() -> bool:
    """Whether `torch.jit.trace` traces; torch.jit's own function of this name has no types."""
    return torch._C._is_tracing()


def is_transforming() -> bool:
    """Whether `torch.func` or forward-mode differentiation is active; no public function tells."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_dispatch_watched() -> bool:
    """Whether a `TorchDispatchMode` is active; no public function tells."""
    return torch._C._len_torch_dispatch_stack() > 0


def writes(operation: OpOverload) -> bool:
    """Whether an operation writes into an argument; nothing public tells."""
    return operation._schema.is_mutable


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as autograd counts; no public function tells."""
    return tensor._version


def storage_of(tensor: Tensor) -> int:
    """Return the id of a tensor's storage; `data_ptr` is 0 for every tensor without memory."""
    return int(tensor.untyped_storage()._cdata)


def users_of_storage(tensor: Tensor) -> int:
    """Return how many tensors use a tensor's storage; Python's refcount is that of the wrapper."""
    return int(torch._C._storage_Use_Count(storage_of(tensor)))


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether hooks wait for a parameter's gradient; they can be registered, but not listed."""
    accumulating = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(parameter._backward_hooks or accumulating)


def has_post_load_hook(module: nn.Module, hook: Callable[..., object]) -> bool:
    """Whether a module has this hook already; hooks can be registered, but not listed."""
    return hook in module._load_state_dict_post_hooks.values()


def is_split_by_hand(module: nn.Module) -> bool:
    """Whether `parallelize_module` was applied; its DTensors look like those of `fully_shard`."""
    return bool(getattr(module, "_distribute_module_applied", False))


def chained(scheduler: ChainedScheduler) -> LRScheduler:
    """Return the first scheduler of a chain; the chain itself keeps no step count."""
    return scheduler._schedulers[0]


def default_store() -> Any:
    """Return the default process group's store; a store of our own would need an address."""
    return dist.distributed_c10d._get_default_store()


def is_strided_shard(placement: Any) -> bool:
    """Whether a placement is FSDP2's over tensor parallelism, which is no subclass of `Shard`."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def leaves(tree: object) -> list[Any]:
    """Return the leaves of nested containers; torch's public module for this is newer."""
    return tree_leaves(tree)


def fully_sharded_modules() -> Iterator[tuple[nn.Module, list[Any]]]:
    """Iterate over (module, its FSDP2 parameters) of all modules `fully_shard` was called on.

    No public API leads from a gathered parameter to the module that gathered it.
    """
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    for module, reference in list(_module_state_mapping.items()):
        state = reference()
        if isinstance(state, FSDPState):
            yield module, [p for group in parameter_groups(state) for p in group.fsdp_params]


def parameter_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of an FSDP2 module's state."""
    several = getattr(state, "_fsdp_param_groups", None)  # newer torch
    if several is not None:
        return list(several)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def owner_of(parameter: Any) -> nn.Module:
    """Return the module that owns one of FSDP2's parameters."""
    module: nn.Module = parameter._module_info.module
    return module


def has_unreduced_gradient(parameter: Any) -> bool:
    """Whether FSDP2 holds a gradient of this parameter that is not reduced yet."""
    if getattr(parameter, "unsharded_accumulated_grad", None) is not None:
        return True
    whole = getattr(parameter, "_unsharded_param", None)
    return whole is not None and whole.grad is not None

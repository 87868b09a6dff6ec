"""FSDP2's state, as far as a restart must know it: what is gathered, what waits to be reduced."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def _used() -> bool:
    """Whether anything has imported FSDP; importing it here would take half a second."""
    return "torch.distributed.fsdp" in sys.modules


def _states() -> Iterator[tuple[nn.Module, Any]]:
    """Iterate over every module that `fully_shard` owns, with its state."""
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    for module, reference in list(_module_state_mapping.items()):
        state = reference()
        if isinstance(state, FSDPState):
            yield module, state


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to `model` or to a part of it."""
    return bool(_owners(model))


def fsdp_owns(module: nn.Module) -> bool:
    """Whether `fully_shard` of `module`, or of one around it, shards `module`'s own parameters.

    While they are gathered, nothing at `module` tells them from plain ones: FSDP2 has to be asked.
    """
    return _used() and any(
        parameter._module_info.module is module
        for _, state in _states()
        for group in parameter_groups(state)
        for parameter in group.fsdp_params
    )


def unreduced_gradients(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of those modules of whose parameters FSDP2 keeps gradients to be reduced yet.

    They are whole, and in no `grad`: `set_requires_gradient_sync(False)` accumulates them so.
    """
    wanted, found = set(map(id, modules)), set()
    for _, state in _states() if _used() else ():
        for group in parameter_groups(state):
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                waits = getattr(parameter, "unsharded_accumulated_grad", None) is not None
                waits = waits or (whole is not None and whole.grad is not None)
                if waits and id(parameter._module_info.module) in wanted:
                    found.add(id(parameter._module_info.module))
    return found


def is_flat(model: nn.Module) -> bool:
    """Whether FSDP1 keeps parameters of `model` in flat ones."""
    if not _used():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def parameter_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of an FSDP2 module's state."""
    several = getattr(state, "_fsdp_param_groups", None)  # of newer torch
    if several is not None:
        return list(several)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def reshard_owners_(modules: Iterable[nn.Module]) -> None:
    """Make the FSDP2 modules that own parameters of `modules` hold their shards again."""
    wanted = set(map(id, modules))
    for owner, state in _states() if wanted and _used() else ():
        groups = parameter_groups(state)
        owned = (id(p._module_info.module) for group in groups for p in group.fsdp_params)
        if not wanted.isdisjoint(owned):
            _reshard_(owner)


def reshard_(model: nn.Module) -> None:
    """Make every FSDP2 module of `model` hold its shards again.

    After a forward without backward, the root's parameters (and, with
    `reshard_after_forward=False`, all of them) are gathered copies, and a write to a copy is
    lost when FSDP drops it.
    """
    for module in _owners(model):
        _reshard_(module)


def _owners(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that `fully_shard` was called on."""
    if not _used():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard_(module: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.reshard()

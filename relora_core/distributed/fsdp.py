"""The part of FSDP2's state that a restart needs: gathered parameters and unreduced gradients."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from relora_core._torch_private import fully_sharded_modules, has_unreduced_gradient, owner_of


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to `model` or to a part of it."""
    return bool(_owners(model))


def fsdp_owns(module: nn.Module) -> bool:
    """Whether `fully_shard`, on `module` or a module around it, owns `module`'s own parameters.

    While they are gathered they look like plain parameters, so only FSDP2's own state can tell.
    """
    return any(owner_of(parameter) is module for parameter in _parameters())


def unreduced_gradients(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of those of `modules` for which FSDP2 holds unreduced gradients.

    `set_requires_gradient_sync(False)` accumulates such gradients whole, and outside `grad`.
    """
    wanted = set(map(id, modules))
    return wanted & {id(owner_of(p)) for p in _parameters() if has_unreduced_gradient(p)}


def is_flat(model: nn.Module) -> bool:
    """Whether FSDP1 has flattened parameters of `model`."""
    if not _is_used():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def reshard_owners_(modules: Iterable[nn.Module]) -> None:
    """Reshard the FSDP2 modules that own parameters of `modules`."""
    wanted = set(map(id, modules))
    for owner, parameters in fully_sharded_modules() if wanted and _is_used() else ():
        if not wanted.isdisjoint(id(owner_of(p)) for p in parameters):
            _reshard_(owner)


def reshard_(model: nn.Module) -> None:
    """Reshard every FSDP2 module of `model`.

    After a forward without backward, the root's parameters (with `reshard_after_forward=False`,
    all parameters) are gathered copies. A write to a copy is lost when FSDP frees the copy.
    """
    for module in _owners(model):
        _reshard_(module)


def _is_used() -> bool:
    """Whether anything has imported FSDP; importing it here would take half a second."""
    return "torch.distributed.fsdp" in sys.modules


def _parameters() -> Iterator[Any]:
    for _, parameters in fully_sharded_modules() if _is_used() else ():
        yield from parameters


def _owners(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that `fully_shard` was called on."""
    if not _is_used():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard_(module: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.reshard()

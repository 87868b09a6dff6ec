"""Tied weights: tensors that lie in one memory under several names."""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from relora_core._sharding import local

Owner = tuple[nn.Module, str]


def memory_of(tensor: Tensor) -> tuple[int, int, int]:
    """Return the storage of this process's part of a tensor, and the bytes of it that it spans."""
    part = local(tensor.detach())
    steps = zip(part.shape, part.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps) if part.numel() else 0
    begin = int(part.storage_offset()) * part.element_size()
    return part.untyped_storage()._cdata, begin, begin + int(span) * part.element_size()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a write to one of two tensors may change the other.

    Examples:
        >>> x = torch.zeros(4)
        >>> share_memory(x[:3], x[2:]), share_memory(x[:2], x[2:])
        (True, False)
    """
    (one, begin, end), (other, first, last) = memory_of(a), memory_of(b)
    return one == other and begin < last and first < end


def tied_to(tensor: Tensor, owners: Mapping[int, list[tuple[Owner, Tensor]]]) -> list[Owner]:
    """Return those that own a tensor in the memory of `tensor`, which may be among them.

    Args:
        tensor: any.
        owners: by storage, as `by_storage` returns them.
    """
    found = owners.get(memory_of(tensor)[0], ())
    return [owner for owner, other in found if other is tensor or share_memory(tensor, other)]


def by_storage(modules: Iterable[nn.Module]) -> dict[int, list[tuple[Owner, Tensor]]]:
    """Return who owns what in each storage: the modules' own Parameters and buffers."""
    found: dict[int, list[tuple[Owner, Tensor]]] = {}
    for module in modules:
        for kind in ("_parameters", "_buffers"):  # not an attribute: wrappers answer for others
            for name, tensor in module.__dict__.get(kind, {}).items():
                if isinstance(tensor, Tensor) and _has_memory(tensor):
                    found.setdefault(memory_of(tensor)[0], []).append(((module, name), tensor))
    return found


def _has_memory(tensor: Tensor) -> bool:
    if is_lazy(tensor):
        return False
    part = local(tensor.detach())
    return part.layout == torch.strided and type(part) is Tensor


def living_modules() -> Iterator[nn.Module]:
    """Iterate over every module that there is, whatever model it belongs to."""
    classes: dict[type, bool] = {}
    for one in gc.get_objects():
        kind = type(one)  # not isinstance: proxies answer for what they stand for
        is_module = classes.get(kind)
        if is_module is None:
            is_module = classes[kind] = issubclass(kind, nn.Module)
        if is_module:
            yield one


def may_be_tied(module: nn.Module, tensor_name: str) -> bool:
    """Whether something beside `module` refers to its Parameter, or to its memory.

    An optimizer does too; but where nothing does, no module needs to be looked at.
    """
    alone = nn.Module()
    alone.weight = nn.Parameter(torch.empty(1))
    usual = _references(alone, "weight")
    return any(a > b for a, b in zip(_references(module, tensor_name), usual, strict=True))


def _references(module: nn.Module, tensor_name: str) -> tuple[int, int]:
    parameter = module._parameters[tensor_name]
    assert parameter is not None
    if not _has_memory(parameter):
        return 0, 0
    storage = local(parameter.detach()).untyped_storage()
    return sys.getrefcount(parameter), torch._C._storage_Use_Count(storage._cdata)


def refuse_ties(tensors: Mapping[str, Owner]) -> None:
    """Raise ValueError if a module of whatever model owns one of these tensors under another name.

    Args:
        tensors: Parameters of modules, by the name to give in the error.
    """
    suspects = {name: owner for name, owner in tensors.items() if may_be_tied(*owner)}
    if not suspects or not _other_owners(suspects):
        return
    gc.collect()  # what only waits to be collected owns nothing
    for name, (module, tensor_name) in _other_owners(suspects).items():
        raise ValueError(
            f"{name} is tied to {tensor_name} of a {type(module).__name__}: a merge would change "
            "every use of it; untie it, or leave it out"
        )


def _other_owners(tensors: Mapping[str, Owner]) -> dict[str, Owner]:
    owners = by_storage(living_modules())
    found = {}
    for name, (module, tensor_name) in tensors.items():
        parameter = module._parameters[tensor_name]
        assert parameter is not None
        for other, other_name in tied_to(parameter, owners):
            if other is not module or other_name != tensor_name:
                found[name] = (other, other_name)
    return found

"""Tied weights: tensors that lie in one memory under several names."""

import gc
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from relora_core.local import local

Owner = tuple[nn.Module, str]
# An address space (a device, or one storage without addresses), and what is spanned of it.
Memory = tuple[object, int, int]


def memory_of(tensor: Tensor) -> Memory:
    """Return where this process's part of a tensor lies, and the addresses that it spans.

    Addresses and not storages: NumPy and DLPack give one memory several storages.
    """
    part = local(tensor.detach())
    steps = zip(part.shape, part.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps) if part.numel() else 0
    space: object = part.device
    if part.is_meta or type(part) is not Tensor or not part.numel():  # without addresses
        space = part.untyped_storage()._cdata
        begin = int(part.storage_offset()) * part.element_size()
    else:
        begin = part.data_ptr()
    return space, begin, begin + int(span) * part.element_size()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a write to one of two tensors may change the other.

    Examples:
        >>> x = torch.zeros(4)
        >>> share_memory(x[:3], x[2:]), share_memory(x[:2], x[2:])
        (True, False)
    """
    (one, begin, end), (other, first, last) = memory_of(a), memory_of(b)
    return one == other and begin < last and first < end


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two entries of a tensor may lie in one place.

    Examples:
        >>> overlaps_itself(torch.zeros(4, 1).expand(4, 2)), overlaps_itself(torch.zeros(4, 2).t())
        (True, False)
    """
    steps = sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    )
    reach = 0  # of the entries along the dimensions before
    for stride, size in steps:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


class Owners:
    """The owners of tensors, found by address.

    Args:
        owned: owners with what they own.
    """

    def __init__(self, owned: Iterable[tuple[Owner, Tensor]]) -> None:
        spans: dict[object, list[tuple[int, int, int]]] = defaultdict(list)
        self._owners: list[Owner] = []
        for owner, tensor in owned:
            if _has_memory(tensor):
                space, begin, end = memory_of(tensor)
                spans[space].append((begin, end, len(self._owners)))
                self._owners.append(owner)
        self._spans = {space: sorted(found) for space, found in spans.items()}
        self._last = {
            space: list(accumulate((end for _, end, _ in found), max))
            for space, found in self._spans.items()
        }

    def of(self, tensor: Tensor) -> list[Owner]:
        """Return those that own something in the memory of `tensor`."""
        if not _has_memory(tensor):
            return []
        space, begin, end = memory_of(tensor)
        spans, last = self._spans.get(space, []), self._last.get(space, [])
        found = []
        index = bisect_left(spans, (end,)) - 1
        while index >= 0 and last[index] > begin:  # or none before it reaches so far
            if spans[index][1] > begin:
                found.append(self._owners[spans[index][2]])
            index -= 1
        return found[::-1]


def owned_by(modules: Iterable[nn.Module]) -> Iterator[tuple[Owner, Tensor]]:
    """Iterate over the modules' own Parameters and buffers."""
    for module in modules:
        for kind in ("_parameters", "_buffers"):  # not an attribute: wrappers answer for others
            for name, tensor in module.__dict__.get(kind, {}).items():
                if isinstance(tensor, Tensor):
                    yield (module, name), tensor


def kept_by(modules: Iterable[nn.Module]) -> Iterator[tuple[Owner, Tensor]]:
    """Iterate over the tensors in other attributes, and in lists, tuples and dicts there."""
    for module in modules:
        for name, value in module.__dict__.items():
            # A recurrent layer makes its list of weights anew at each forward.
            if name in ("_parameters", "_buffers", "_flat_weights"):
                continue
            items = value.values() if isinstance(value, dict) else value
            for one in items if isinstance(value, list | tuple | dict) else (value,):
                if isinstance(one, Tensor):
                    yield (module, name), one


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


def _references(module: nn.Module, tensor_name: str) -> tuple[int, int, bool]:
    parameter = module._parameters[tensor_name]
    assert parameter is not None
    if not _has_memory(parameter):
        return 0, 0, False
    storage = local(parameter.detach()).untyped_storage()
    count = torch._C._storage_Use_Count(storage._cdata)
    # Memory that another library has lent (NumPy, DLPack) may be lent to others.
    return sys.getrefcount(parameter), count, not storage.resizable()


def refuse_ties(tensors: Mapping[str, Owner], *, kept: bool = False) -> None:
    """Raise ValueError if a module of whatever model has one of these tensors under another name.

    Args:
        tensors: Parameters of modules, by the name to give in the error.
        kept: whether to look into other attributes too (`kept_by`), which may be there to read.
    """
    suspects = {name: owner for name, owner in tensors.items() if may_be_tied(*owner)}
    if not suspects or not _other_owners(suspects, kept):
        return
    gc.collect()  # what only waits to be collected owns nothing
    for name, (module, tensor_name) in _other_owners(suspects, kept).items():
        raise ValueError(
            f"{name} is tied to {tensor_name} of a {type(module).__name__}: a merge would change "
            "every use of it; untie it, leave it out, or drop what uses it"
        )


def _other_owners(tensors: Mapping[str, Owner], kept: bool) -> dict[str, Owner]:
    modules = list(living_modules())
    owners = Owners(chain(owned_by(modules), kept_by(modules) if kept else ()))
    found = {}
    for name, (module, tensor_name) in tensors.items():
        parameter = module._parameters[tensor_name]
        assert parameter is not None
        for other, other_name in owners.of(parameter):
            itself = other is module and other_name == tensor_name
            if not itself and not _stands_for(other, module):
                found[name] = (other, other_name)
    return found


def _stands_for(other: nn.Module, module: nn.Module) -> bool:
    """Whether a module is what `torch.jit.trace` or `torch.export` made of a parametrization.

    It has the factors too, and computes with them.
    """
    if not isinstance(module, ParametrizationList) or isinstance(other, ParametrizationList):
        return False
    return set(map(id, module.parameters())) <= set(map(id, other.parameters()))

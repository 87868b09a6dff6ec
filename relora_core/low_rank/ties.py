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

from relora_core._torch_private import storage_of, users_of_storage
from relora_core.distributed.local import local
from relora_core.low_rank.reach import tensors_in

Owner = tuple[nn.Module, str]
# An address space (a device, or a storage without addresses), and the begin and end in it.
Memory = tuple[object, int, int]


def memory_of(tensor: Tensor) -> Memory:
    """Return the address space of this process's part of a tensor, and the addresses it spans.

    Ties are found by address, not by storage, because NumPy and DLPack give one memory several
    storages.
    """
    part = local(tensor.detach())
    space: object = part.device
    if part.is_meta or type(part) is not Tensor or not part.numel():  # without addresses
        space = storage_of(part)
        begin = int(part.storage_offset()) * part.element_size()
    else:
        begin = part.data_ptr()
    return space, begin, begin + _span(part) * part.element_size()


def _span(part: Tensor) -> int:
    """Return how many entries lie from a tensor's first to its last."""
    steps = zip(part.shape, part.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) if part.numel() else 0


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a write to one of two tensors may change the other.

    Examples:
        >>> x = torch.zeros(4)
        >>> share_memory(x[:3], x[2:]), share_memory(x[:2], x[2:])
        (True, False)
    """
    (one, begin, end), (other, first, last) = memory_of(a), memory_of(b)
    if one != other or begin >= last or first >= end:
        return False
    a, b = local(a.detach()), local(b.detach())
    size = a.element_size()
    dense = a.numel() * size == end - begin and b.numel() * b.element_size() == last - first
    if dense or size != b.element_size() or (begin - first) % size:
        return True
    return _interleave(a, b, (begin - first) // size)


def _interleave(a: Tensor, b: Tensor, ahead: int) -> bool:
    """Whether two tensors have an entry in common; `a` begins `ahead` entries after `b`.

    Two columns of one matrix span overlapping memory, but have no entry in common.
    """
    begin_a, begin_b = max(ahead, 0), max(-ahead, 0)
    taken = torch.zeros(max(begin_a + _span(a), begin_b + _span(b)), dtype=torch.bool)
    taken.as_strided(a.shape, a.stride(), begin_a).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), begin_b).any())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two entries of a tensor may share one address.

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
        owned: pairs of an owner and its tensor.
    """

    def __init__(self, owned: Iterable[tuple[Owner, Tensor]]) -> None:
        spans: dict[object, list[tuple[int, int, int]]] = defaultdict(list)
        self._owned: list[tuple[Owner, Tensor]] = []
        for owner, tensor in owned:
            if _has_memory(tensor):
                space, begin, end = memory_of(tensor)
                spans[space].append((begin, end, len(self._owned)))
                self._owned.append((owner, tensor))
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
        while index >= 0 and last[index] > begin:  # otherwise no earlier span reaches this far
            owner, other = self._owned[spans[index][2]]
            if spans[index][1] > begin and (other is tensor or share_memory(other, tensor)):
                found.append(owner)
            index -= 1
        return found[::-1]


def owned_by(modules: Iterable[nn.Module]) -> Iterator[tuple[Owner, Tensor]]:
    """Iterate over the modules' own Parameters and buffers."""
    for module in modules:
        for kind in ("_parameters", "_buffers"):  # not getattr: wrappers forward attributes
            for name, tensor in module.__dict__.get(kind, {}).items():
                if isinstance(tensor, Tensor):
                    yield (module, name), tensor


def kept_by(modules: Iterable[nn.Module]) -> Iterator[tuple[Owner, Tensor]]:
    """Iterate over single tensors that other attributes hold, in containers and closures too.

    Several tensors in one attribute are taken for a mere list, for clipping gradients say, that
    nothing computes with.
    """
    for module in modules:
        for name, value in module.__dict__.items():
            if name not in _OWN:
                kept = {id(tensor): tensor for tensor in tensors_in(value, objects=0)}
                if len(kept) == 1:
                    yield (module, name), next(iter(kept.values()))


# Left out: torch's own attributes, and the list of weights that a recurrent layer keeps rebuilding.
_OWN = frozenset({*nn.Module().__dict__, "_flat_weights"})


def _has_memory(tensor: Tensor) -> bool:
    if is_lazy(tensor) or tensor.is_nested:
        return False
    part = local(tensor.detach())
    return part.layout == torch.strided and type(part) is Tensor


def living_modules() -> list[nn.Module]:
    """Return every existing module of any model, except those that gc.freeze hides."""
    classes = {nn.Module}
    waiting = [nn.Module]
    while waiting:
        new = set(waiting.pop().__subclasses__()) - classes
        classes |= new
        waiting += new
    # Not isinstance: proxies pass for the objects that they wrap.
    return [one for one in gc.get_objects() if type(one) in classes]


def may_be_tied(module: nn.Module, tensor_name: str) -> bool:
    """Whether anything besides `module` refers to its Parameter, or to the Parameter's memory.

    That may be an optimizer only. But if nothing does, no other module needs to be searched.
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
    part = local(parameter.detach())
    # Memory borrowed from another library (NumPy, DLPack) may be shared with others, too.
    lent = not part.untyped_storage().resizable()
    return sys.getrefcount(parameter), users_of_storage(part), lent


def refuse_ties(tensors: Mapping[str, Owner], *, kept: bool = False) -> None:
    """Raise ValueError if a module of any model has one of these tensors under another name.

    Args:
        tensors: the owners of the Parameters, by the name to show in the error.
        kept: whether to look into other attributes too (`kept_by`).
    """
    suspects = {name: owner for name, owner in tensors.items() if may_be_tied(*owner)}
    if not suspects or not _other_owners(suspects, kept):
        return
    gc.collect()  # modules that are only waiting for collection do not count
    for name, (module, tensor_name) in _other_owners(suspects, kept).items():
        other = f"{tensor_name} of a {type(module).__name__}"
        if isinstance(module, ParametrizationList):
            other = "the W of another low-rank site"
        raise ValueError(
            f"{name} is tied to {other}: a merge would change every use of it; untie it, leave it "
            "out, or drop what uses it"
        )


def _other_owners(tensors: Mapping[str, Owner], kept: bool) -> dict[str, Owner]:
    modules = living_modules()
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
    """Whether `torch.jit.trace` or `torch.export` made `other` from the parametrization `module`.

    Such a module holds the factors, too, and computes with them.
    """
    if not isinstance(module, ParametrizationList) or isinstance(other, ParametrizationList):
        return False
    if any(one is module for one in other.modules()):  # the model itself
        return False
    return set(map(id, module.parameters())) <= set(map(id, other.parameters()))

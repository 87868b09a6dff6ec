"""Tensors that an object refers to: in containers, closures and, to a set depth, in objects."""

import functools
from collections import deque
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_CONTAINERS = (list, tuple, set, frozenset, deque)
_LISTS = (nn.ParameterList, nn.ParameterDict)
_PASSED_OVER = (nn.Module, Optimizer, type, ModuleType, str, bytes, int, float, complex)


def tensors_in(value: Any, *, objects: int) -> Iterator[Tensor]:
    """Iterate over the tensors that a value holds.

    Modules and optimizers are skipped, because their tensors belong to them.

    Args:
        value: any object.
        objects: how many objects deep to look; containers and functions do not count.
    """
    seen: set[int] = set()
    waiting = [(value, objects)]
    while waiting:
        one, left = waiting.pop()
        kind = type(one)  # not isinstance: proxies pass for the objects that they wrap
        if issubclass(kind, Tensor):
            yield one
            continue
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if issubclass(kind, _LISTS):
            waiting += [(item, left) for item in one.parameters(recurse=False)]
        elif issubclass(kind, _PASSED_OVER):
            continue
        elif issubclass(kind, Mapping):
            waiting += [(item, left) for item in one.values()]
        elif issubclass(kind, _CONTAINERS):
            waiting += [(item, left) for item in one]
        elif issubclass(kind, FunctionType | MethodType | functools.partial):
            waiting += [(item, left) for item in _parts(one)]
        elif left:
            waiting += [(item, left - 1) for item in attributes_of(one).values()]


def attributes_of(one: object) -> dict[str, Any]:
    """Return an object's own attributes, including those in slots."""
    slots = (name for cls in type(one).__mro__ for name in _slots(cls))
    found = {name: getattr(one, name) for name in slots if hasattr(one, name)}
    return found | getattr(one, "__dict__", {})


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = (name.startswith("__") and not name.endswith("__") for name in names)
    return tuple(
        f"_{cls.__name__.lstrip('_')}{name}" if own else name
        for name, own in zip(names, private, strict=True)
    )


def _parts(one: Any) -> list[Any]:
    """Return what a function, a method or a partial refers to, except globals."""
    if isinstance(one, FunctionType):
        cells = [_contents(cell) for cell in one.__closure__ or ()]
        return [*cells, *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
    if isinstance(one, MethodType):
        return [one.__self__, one.__func__]
    return [one.func, one.args, one.keywords]


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None

"""Copies of parameters that an optimizer keeps beside its state, where no redraw reaches them."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.local import local
from relora_core.ties import living_modules, owned_by

# Objects are followed so far from the optimizer: beyond lie trainers, with all that they know.
_OBJECTS = 2
_PASSED_OVER = (nn.Module, Optimizer, type, ModuleType, str, bytes, int, float, complex)


def refuse_copies(optimizers: Iterable[Optimizer], params: Iterable[nn.Parameter]) -> None:
    """Raise ValueError if optimizers hold what look like copies of parameters.

    That is a tensor of the shape of one that has two dimensions or more, or one vector as long as
    all together, in their attributes and hooks, in the options of their groups, and in containers
    and objects there; `state` is for declarations to tell.

    Args:
        optimizers: from the outermost to the innermost.
        params: those that are reset.
    """
    optimizers, params = list(optimizers), list(params)
    outermost = [list(group["params"]) for group in optimizers[0].param_groups]
    every = [*params, *(p for group in outermost for p in group)]
    known = {id(t) for p in every for t in (p, p.grad)}
    shapes = {shape for p in params if p.ndim > 1 for shape in (p.shape, local(p).shape)}
    lengths = [sum(p.numel() for p in some) for some in (params, every[len(params) :], *outermost)]
    owned: set[int] | None = None
    for optimizer in optimizers:
        for place, tensor in _held(optimizer):
            if id(tensor) in known:
                continue
            flat = tensor.ndim == 1 and any(n <= tensor.numel() <= 1.01 * n for n in lengths)
            if tensor.shape not in shapes and not (flat and len(params) > 1):
                continue
            if isinstance(tensor, nn.Parameter):
                owned = _in_models() if owned is None else owned
                if id(tensor) in owned:
                    continue
            raise ValueError(
                f"{type(optimizer).__name__}.{place} holds tensors of the parameters' shapes "
                f"({tuple(tensor.shape)}), such as slow or averaged copies: a redraw would not "
                "reach them, and steps would go back to the old parameters. Keep them in "
                "`state` and declare them by relora_core.declare_moments(copies=...), or leave "
                "the wrapper out"
            )


def _in_models() -> set[int]:
    """Return the identities of the Parameters of every module that there is."""
    return {id(tensor) for _, tensor in owned_by(list(living_modules()))}


def _held(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Iterate over what an optimizer holds beside its state, each with the attribute's name."""
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups"):
            yield from ((name, tensor) for tensor in _tensors_in(value))
    for group in optimizer.param_groups:
        for name, value in group.items():
            yield from ((f"param_groups[...][{name!r}]", t) for t in _tensors_in(value))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors that a value holds, in containers, objects and closures."""
    seen: set[int] = set()
    waiting = [(value, _OBJECTS)]
    while waiting:
        one, objects = waiting.pop()
        if issubclass(type(one), Tensor):  # not isinstance: proxies answer for what they stand for
            yield one
        elif one is None or issubclass(type(one), _PASSED_OVER) or id(one) in seen:
            continue
        elif isinstance(one, Mapping):
            waiting += [(item, objects) for item in one.values()]
        elif isinstance(one, list | tuple | set | frozenset | deque):
            waiting += [(item, objects) for item in one]
        elif objects:
            waiting += [(item, objects - 1) for item in _parts(one)]
        seen.add(id(one))


def _parts(one: object) -> list[Any]:
    """Return what an object refers to by itself, and a function by its closure."""
    if isinstance(one, FunctionType):
        return [_contents(cell) for cell in one.__closure__ or ()]
    if isinstance(one, MethodType):
        return [one.__self__]
    if isinstance(one, functools.partial):
        return [one.func, one.args, one.keywords]
    return list(getattr(one, "__dict__", {}).values())


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None

"""Copies of parameters that an optimizer keeps outside its state, where no redraw reaches them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.distributed.local import local
from relora_core.low_rank.reach import attributes_of, tensors_in
from relora_core.low_rank.ties import Owners, living_modules, owned_by

# How many objects deep the search goes: deeper lie trainers, with everything they refer to.
_OBJECTS = 2
# A shorter vector may be anything, such as a table of codes.
_FLAT = 1024


def refuse_copies(optimizers: Iterable[Optimizer], params: Iterable[nn.Parameter]) -> None:
    """Raise ValueError if optimizers hold tensors that look like copies of parameters.

    Three things look like copies: tensors with the shapes of at least half of the parameters that
    have two or more dimensions; one vector as long as all parameters together; or one vector for
    each parameter. The search covers the attributes, hooks and group options of the optimizers,
    containers and objects in them, and the attributes of the parameters. Tensors in the parameters'
    own memory are not copies, and `state` is left to declarations.

    Args:
        optimizers: the optimizers, from the outermost to the innermost.
        params: the parameters to reset.
    """
    optimizers, params = list(optimizers), list(params)
    groups = [list(group["params"]) for group in optimizers[0].param_groups]
    every = [*params, *(p for group in groups for p in group)]
    sought = _Sought(params, groups)
    known = {id(t) for p in every for t in (p, p.grad)}
    nobody = nn.Module(), ""
    memory = Owners((nobody, p) for p in every)
    owned: set[int] | None = None
    for place, value in _places(optimizers, params):
        held = {id(t): t for t in tensors_in(value, objects=_OBJECTS) if id(t) not in known}
        found = sought.copies([t for t in held.values() if not memory.of(t)])
        if found and any(isinstance(t, nn.Parameter) for t in found):
            owned = _in_models() if owned is None else owned
            found = sought.copies([t for t in found if id(t) not in owned])
        if found:
            raise ValueError(
                f"{place} holds what looks like copies of the parameters (a tensor of shape "
                f"{tuple(found[0].shape)}): a redraw would not reach them, and the next step would "
                "bring the old parameters back. Keep them in `state` and declare them by "
                "relora_core.declare_moments(copies=...), or leave the wrapper out; tensors that "
                "no step reads can be kept where no optimizer refers to them"
            )


class _Sought:
    """The shapes that copies of some parameters would have."""

    def __init__(self, params: list[nn.Parameter], groups: list[list[nn.Parameter]]) -> None:
        self.matrices = [p for p in params if p.ndim > 1]
        self.shapes = {shape for p in self.matrices for shape in (p.shape, local(p).shape)}
        several = (params, [p for group in groups for p in group], *groups)
        self.lengths = [sum(p.numel() for p in some) for some in several if len(some) > 1]
        self.each = Counter(p.numel() for p in self.matrices)

    def copies(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return those of `tensors` that together look like copies."""
        found = [t for t in tensors if t.shape in self.shapes]
        if 2 * len(found) >= max(len(self.matrices), 1):
            return found
        flat = [t for t in tensors if t.ndim == 1 and t.numel() >= _FLAT and self._is_all(t)]
        if flat:
            return flat
        vectors = [t for t in tensors if t.ndim == 1 and t.numel() in self.each]
        alike = Counter(t.numel() for t in vectors)
        return vectors if len(self.matrices) > 1 and alike >= self.each else []

    def _is_all(self, vector: Tensor) -> bool:
        """Whether a vector is as long as all parameters together, with some padding at most."""
        return any(n <= vector.numel() <= n + max(n // 100, _FLAT) for n in self.lengths)


def _in_models() -> set[int]:
    """Return the ids of all modules' tensors, without parameter lists, which may hold copies."""
    lists = (nn.ParameterList, nn.ParameterDict)
    modules = [module for module in living_modules() if not issubclass(type(module), lists)]
    return {id(tensor) for _, tensor in owned_by(modules)}


def _places(optimizers: list[Optimizer], params: list[nn.Parameter]) -> Iterator[tuple[str, Any]]:
    """Iterate over (name, value) of what optimizers and parameters hold outside `state`."""
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        for name, value in attributes_of(optimizer).items():
            if name not in ("state", "param_groups"):
                yield f"{kind}.{name}", value
        for group in optimizer.param_groups:
            for name, value in group.items():
                yield f"{kind}.param_groups[...][{name!r}]", value
    noted: dict[str, list[Any]] = {}
    for p in params:
        for name, value in vars(p).items():
            if "grad" not in name:  # some engines accumulate gradients there
                noted.setdefault(name, []).append(value)
    yield from ((f"Parameter.{name}", values) for name, values in noted.items())

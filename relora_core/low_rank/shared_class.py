"""One class for all modules of a class that have the same low-rank tensors.

Torch gives each parametrized module a class of its own. `torch.compile` guards on the class: twelve
equal blocks would be twelve graphs, of which it keeps eight and runs the other blocks eagerly.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from torch.nn.utils import parametrize

from relora_core.low_rank.parametrization import LowRank

_classes: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()


def share_class_(module: nn.Module) -> None:
    """Give `module`, which torch has parametrized, the class that all like it have.

    A module with parametrizations of others besides keeps its own.
    """
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    if not all(_is_site(one) for one in lists.values()):
        return
    own = type(module)
    original = own.__bases__[0]
    key = (original, tuple(sorted(lists)))
    shared = _classes.get(key)
    if shared is None:
        metaclass = _metaclass(type(original))
        shared = metaclass(own.__name__, own.__bases__, _members(own))
        type.__setattr__(shared, "__delattr__", _parting(shared))
        _classes[key] = shared
    module.__class__ = shared


def _is_site(found: nn.Module) -> bool:
    assert isinstance(found, parametrize.ParametrizationList)
    return len(found) == 1 and isinstance(found[0], LowRank)


def own_class_(module: nn.Module) -> None:
    """Give `module` a class of its own again, that may be changed without changing others.

    Not only a shared class belongs to others: a deepcopy has the class of its original.
    """
    cls = type(module)
    members = _members(cls)
    if isinstance(cls, _Shared):
        members.pop("__delattr__", None)
    module.__class__ = type(cls.__bases__[0])(cls.__name__, cls.__bases__, members)


class _Shared(type):
    """The type of shared classes, from which torch would remove a tensor of all at once."""

    def __delattr__(cls, name: str) -> None:
        raise AttributeError(
            f"{name} is a low-rank site of other modules too: call relora_core.remove_low_rank "
            "instead of torch's remove_parametrizations"
        )


def _metaclass(original: type[type]) -> type[type]:
    return _Shared if original is type else type("_Shared", (_Shared, original), {})


def _members(cls: type) -> dict[str, Any]:
    return {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}


def _parting(shared: type) -> Callable[[nn.Module, str], None]:
    """Return the `__delattr__` of a shared class."""

    def part(module: nn.Module, name: str) -> None:
        """Delete an attribute; a tensor, which torch is to parametrize, apart from the others."""
        if type(module) is shared and (name in module._parameters or name in module._buffers):
            own_class_(module)
            delattr(module, name)
        else:
            super(shared, module).__delattr__(name)  # type: ignore[arg-type]

    return part

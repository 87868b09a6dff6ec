"""One shared class for all modules of one class that have the same low-rank tensors.

Torch gives each parametrized module its own class, and `torch.compile` guards on the class. Twelve
equal blocks would then need twelve graphs; it keeps eight and runs the other blocks eagerly.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from torch.nn.utils import parametrize

from relora_core.low_rank.parametrization import LowRank

_classes: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()


def share_class_(module: nn.Module) -> None:
    """Give `module`, which torch has parametrized, the class that all modules like it share.

    A module that also has parametrizations from elsewhere keeps its own class.
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
    """Give `module` its own class again, which can be changed without affecting other modules.

    This also applies to a class that is not shared: a deepcopy has the class of its original.
    """
    cls = type(module)
    members = _members(cls)
    if isinstance(cls, _Shared):
        members.pop("__delattr__", None)
    module.__class__ = type(cls.__bases__[0])(cls.__name__, cls.__bases__, members)


class _Shared(type):
    """The metaclass of shared classes; it keeps torch from removing a tensor of all at once."""

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
        """Delete an attribute; for a tensor, give the module its own class first."""
        if type(module) is shared and (name in module._parameters or name in module._buffers):
            own_class_(module)
            delattr(module, name)
        else:
            super(shared, module).__delattr__(name)  # type: ignore[arg-type]

    return part

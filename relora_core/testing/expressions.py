"""Factories that build a new object for each example and print as the code that builds it."""

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

_SHORT = {
    "torch.nn": "nn",
    "torch.optim": "torch.optim",
    "relora_core": "relora",
    "relora_core.testing": "testing",
    "relora_core.testing.examples": "testing.examples",
    "relora_core.testing.strategies": "testing.strategies",
}
_IMPORTS = {
    "nn": "from torch import nn",
    "relora": "import relora_core as relora",
    "testing": "from relora_core import testing",
    "torch": "import torch",
    "functools": "import functools",
}


@dataclass(frozen=True)
class Call:
    """A deferred call that prints as the code of the call.

    Arguments that are deferred calls themselves are evaluated first. Arguments passed at call time
    come before the stored ones, so a deferred call of an optimizer class is an optimizer factory.

    Args:
        function: class or function to call.
        args: positional arguments.
        kwargs: keyword arguments.

    Examples:
        >>> layer = Call(nn.Linear, (3, 2), {"bias": False})
        >>> layer
        nn.Linear(3, 2, bias=False)
        >>> layer()
        Linear(in_features=3, out_features=2, bias=False)
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *first: Any) -> Any:
        """Make the call."""
        named = {key: _made(value) for key, value in self.kwargs.items()}
        return self.function(*first, *map(_made, self.args), **named)

    def __repr__(self) -> str:
        return written(self)

    def __hash__(self) -> int:
        return hash(repr(self))


def _made(value: Any) -> Any:
    return value() if isinstance(value, Call) else value


def written(value: Any, *first: str) -> str:
    """Return the source of a value; for a call, `first` precedes the stored arguments."""
    if isinstance(value, Call):
        return _call(name_of(value.function), first, value.args, value.kwargs)
    if isinstance(value, functools.partial):
        inner = (name_of(value.func), *map(written, value.args))
        return _call("functools.partial", inner, (), value.keywords)
    if callable(value) and not isinstance(value, nn.Module):
        return name_of(value)
    if type(value) is tuple:
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _call(
    name: str, first: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    named = [f"{key}={written(entry)}" for key, entry in kwargs.items()]
    return f"{name}({', '.join([*first, *map(written, args), *named])})"


def as_factory(value: Any, *arguments: str) -> str:
    """Return the source of a factory; for a call, a lambda of `arguments` that makes the call."""
    if isinstance(value, Call):
        return f"lambda{' ' * bool(arguments)}{', '.join(arguments)}: {written(value, *arguments)}"
    return written(value)


def name_of(function: Callable[..., Any]) -> str:
    """Return the name by which a counterexample refers to a function or class."""
    if isinstance(function, functools.partial):
        return written(function)
    name = getattr(function, "__qualname__", type(function).__name__)
    if name.endswith("<lambda>") and isinstance(function, FunctionType):
        return f"lambda_{function.__code__.co_firstlineno}_{_column(function)}"
    name = name.rpartition("<locals>.")[2]
    module = getattr(function, "__module__", "")
    for package, short in _SHORT.items():
        if getattr(sys.modules[package], name, None) is function:
            return f"{short}.{name}"
    return f"{module}.{name}" if module.startswith("torch.") else name


def code(lines: list[str], *mentioned: Any) -> str:
    """Return a program: imports and definitions of the values in `mentioned`, then `lines`."""
    imports: set[str] = set()
    definitions: dict[str, str] = {}
    for value in mentioned:
        for function in _functions(value):
            _define(name_of(function), function, imports, definitions)
    body = "\n".join([*definitions.values(), *lines])
    imports |= {line for name, line in _IMPORTS.items() if re.search(rf"\b{name}\.", body)}
    return "\n".join([*sorted(imports), "", body])


def _functions(value: Any) -> Iterator[Any]:
    if isinstance(value, Call):
        yield from _functions(value.function)
        for entry in (*value.args, *value.kwargs.values()):
            yield from _functions(entry)
    elif isinstance(value, functools.partial):
        yield from _functions(value.func)
    elif callable(value) and not isinstance(value, torch.dtype | nn.Module):
        yield value


def _define(name: str, value: Any, imports: set[str], definitions: dict[str, str]) -> None:
    """Add code that binds `name` to `value`: an import, or a definition with its dependencies."""
    if name in definitions or name.partition(".")[0] in _IMPORTS:
        return
    if isinstance(value, ModuleType):
        imports.add(f"import {value.__name__}" + f" as {name}" * (value.__name__ != name))
        return
    qualified = getattr(value, "__qualname__", None)
    module = getattr(value, "__module__", None)
    if qualified is None or module is None:
        definitions[name] = f"{name} = {written(value)}"
    elif "<" not in qualified and module != "__main__":
        top = qualified.partition(".")[0]
        imports.add(f"from {module} import {top}" + f" as {name}" * (name not in (top, qualified)))
    else:
        definitions[name] = ""  # reserved: it is inserted after its dependencies
        source = _source(value, name)
        for needed, found in _needed(value, source).items():
            _define(needed, found, imports, definitions)
        del definitions[name]
        definitions[name] = source


def _needed(value: Any, source: str) -> dict[str, Any]:
    """Return the values of the names in a definition, except builtins."""
    known = dict(vars(sys.modules[value.__module__]))
    if isinstance(value, FunctionType):
        known |= inspect.getclosurevars(value).nonlocals
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    return {name: known[name] for name in sorted(names) if name in known}


def _source(function: Any, name: str) -> str:
    """Return the definition of a function that cannot be imported, or a stub if it is unknown."""
    unknown = f"{name} = ...  # {function!r}"
    try:
        if isinstance(function, FunctionType) and function.__name__ == "<lambda>":
            found = _lambda(function)
            return f"{name} = {found}" if found else unknown
        return textwrap.dedent(inspect.getsource(function)).rstrip()
    except (OSError, TypeError, SyntaxError):
        return unknown


def _lambda(function: FunctionType) -> str | None:
    """Return the source of a lambda, which may be part of a longer expression."""
    lines, _ = inspect.findsource(function)
    text = "".join(lines)
    begins = {(line, column) for line, _, column, _ in function.__code__.co_positions()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Lambda) and (node.body.lineno, node.body.col_offset) in begins:
            return ast.get_source_segment(text, node)
    return None


def _column(function: FunctionType) -> int:
    columns = [column for _, _, column, _ in function.__code__.co_positions() if column]
    return min(columns, default=0)

"""What is made anew for each example, and how it prints: as the code that makes it."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn

_SHORT = {"torch.nn": "nn", "torch.optim": "torch.optim", "relora_core": "relora"}
_IMPORTS = {
    "nn": "from torch import nn",
    "relora": "import relora_core as relora",
    "testing": "from relora_core import testing",
    "torch": "import torch",
}


@dataclass(frozen=True)
class Call:
    """A call that is made when it is called, and prints as it is written.

    Arguments that are calls themselves are made first. What it is given when it is called goes
    before its own arguments, so that a call of an optimizer's class is a factory of optimizers.

    Args:
        function: a class or a function.
        args: by position.
        kwargs: by keyword.

    Example:
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
    """Return the expression of a value; of a call, with `first` before its own arguments."""
    if isinstance(value, Call):
        named = [f"{key}={written(entry)}" for key, entry in value.kwargs.items()]
        return (
            f"{name_of(value.function)}({', '.join([*first, *map(written, value.args), *named])})"
        )
    if callable(value) and not isinstance(value, nn.Module):
        return name_of(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def as_factory(value: Any, *arguments: str) -> str:
    """Return the expression of a factory: of a call, a lambda of `arguments` that makes it."""
    if isinstance(value, Call):
        return f"lambda{' ' * bool(arguments)}{', '.join(arguments)}: {written(value, *arguments)}"
    return written(value)


def name_of(function: Callable[..., Any]) -> str:
    """Return by which name a counterexample calls a function or class."""
    name = getattr(function, "__qualname__", type(function).__name__)
    if name.endswith("<lambda>"):
        return "make"
    name = name.rpartition("<locals>.")[2]
    module = getattr(function, "__module__", "")
    for package, short in _SHORT.items():
        if getattr(inspect.importlib.import_module(package), name, None) is function:  # type: ignore[attr-defined]
            return f"{short}.{name}"
    if module.startswith("torch."):
        return f"{module}.{name}"
    return f"testing.{name}" if module.startswith(__package__ or "") else name


def code(lines: list[str], *mentioned: Any) -> str:
    """Return a program: imports and definitions of what is mentioned, and then `lines`."""
    text = "\n".join(lines)
    definitions: list[str] = []
    imports = set()
    for function in dict.fromkeys(f for value in mentioned for f in _functions(value)):
        own = name_of(function)
        if "." in own and own.partition(".")[0] in _IMPORTS:
            continue
        local = "<" in getattr(function, "__qualname__", "<") or function.__module__ == "__main__"
        if local:
            definitions.append(_source(function, own))
        else:
            imports.add(f"from {function.__module__} import {own.partition('.')[0]}")
    body = "\n".join([*definitions, text])
    known = [line for name, line in _IMPORTS.items() if f"{name}." in body]
    return "\n".join([*sorted([*known, *imports]), "", body])


def _functions(value: Any) -> Iterator[Any]:
    if isinstance(value, Call):
        yield from _functions(value.function)
        for entry in (*value.args, *value.kwargs.values()):
            yield from _functions(entry)
    elif isinstance(value, functools.partial):
        yield from _functions(value.func)
    elif callable(value) and not isinstance(value, torch.dtype | nn.Module):
        yield value


def _source(function: Any, name: str) -> str:
    """Return the definition of what cannot be imported, as far as it is known."""
    unknown = f"{name} = ...  # {function!r}"
    try:
        if isinstance(function, FunctionType) and function.__name__ == "<lambda>":
            found = _lambda(function)
            return f"{name} = {found}" if found else unknown
        return textwrap.dedent(inspect.getsource(function)).rstrip()
    except (OSError, TypeError, SyntaxError):
        return unknown


def _lambda(function: FunctionType) -> str | None:
    """Return a lambda's own text, which may be within a longer expression."""
    lines, _ = inspect.findsource(function)
    text = "".join(lines)
    begins = {(line, column) for line, _, column, _ in function.__code__.co_positions()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Lambda) and (node.body.lineno, node.body.col_offset) in begins:
            return ast.get_source_segment(text, node)
    return None

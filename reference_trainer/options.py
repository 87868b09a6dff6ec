"""Configuration from a YAML file and the command line, and back into a file.

argparse parses and pydantic validates. The bridge between them, 60 lines, stays our own: of the
libraries that build a parser from dataclasses, tyro (0.1 s to import) has the better help, but
none tells which options were given, which a resumed run needs, and their errors are a box of many
lines where ours is one.
"""

import argparse
import copy
import dataclasses
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from reference_trainer.config import Config
from reference_trainer.errors import UserError, one_line
from reference_trainer.nearest import nearest
from reference_trainer.validated import MismatchError, validated

_SHORT = reprlib.Repr()  # for values that a damaged file makes huge
_SHORT.maxlevel, _SHORT.maxstring = 2, 80


def add_options(parser: argparse.ArgumentParser, *, only: str | None = None) -> None:
    """Give `parser` one option for every field of Config, or of one section of it."""
    group: Any = parser
    for path, field in leaves():
        head, _, leaf = path.rpartition(".")
        if only is not None and head != only:
            continue
        if head and (group is parser or group.title != head):
            group = parser.add_argument_group(head, _field(head).metadata["help"])
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        note = "" if default is None or default == () else f" [{shown}]"
        group.add_argument(
            f"--{path}",
            metavar=leaf.upper(),
            nargs="*" if isinstance(default, tuple) else None,
            help=(field.metadata["help"] + note).replace("%", "%%"),
            default=argparse.SUPPRESS,
        )


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were on the command line, by dotted name."""
    known = {path for path, _ in leaves()}
    return {path: value for path, value in vars(namespace).items() if path in known}


def resolve(file: Path | None, overrides: dict[str, Any]) -> Config:
    """Return the configuration: defaults, then the file's values, then the overrides.

    Raises:
        UserError: if the file cannot be read, a key is unknown or a value is wrong.
    """
    tree = read_tree(file) if file else {}
    known = dict(leaves())
    for name in list(tree):
        if name in known and "." in name:
            head, _, leaf = name.partition(".")
            raise UserError(f"{file}: write {name} nested, as {head}: {{{leaf}: ...}}")
        if tree[name] is None and name not in known:
            del tree[name]  # a section with nothing in it
    for path, field in known.items():
        head, _, leaf = path.rpartition(".")
        branch = tree.get(head, {}) if head else tree
        lists = isinstance(branch, dict) and isinstance(field.default, tuple)
        if lists and isinstance(branch.get(leaf), str):
            branch[leaf] = [branch[leaf]]
    alone = copy.deepcopy(tree)
    for path, value in overrides.items():
        *heads, leaf = path.split(".")
        branch = tree
        for head in heads:
            branch = branch.setdefault(head, {})
            if not isinstance(branch, dict):
                raise UserError(f"{head} is a section, not a value; got {branch!r:.80} in {file}")
        branch[leaf] = value
    try:
        return validated(Config, tree)
    except MismatchError as error:
        message = _one_line(error.first)
    try:
        validated(Config, alone)
    except MismatchError:
        message = f"{file}: {message}"
    raise UserError(message)


def read_tree(file: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file} must hold a mapping of options; got {type(tree).__name__}")
    return tree


def write(config: Config, file: Path) -> None:
    """Write the configuration, every field of it, so that `resolve` reads it back."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def values(config: Config) -> dict[str, Any]:
    """Return every option's value by dotted name."""
    return {path: _value(config, path) for path, _ in leaves()}


def changed(one: Config, other: Config) -> list[str]:
    """Return the dotted names of the fields in which two configurations differ."""
    before, after = values(one), values(other)
    return [path for path in before if before[path] != after[path]]


def leaves(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Iterate over (dotted name, field) of every option."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def _field(path: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(Config) if field.name == path)


def _value(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _one_line(first: Any) -> str:
    name = ".".join(str(part) for part in first["loc"] if part != "function-after")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [path for path, _ in leaves()]
        sections = [field.name for field in dataclasses.fields(Config)]
        return f"unknown option {name}{nearest(name, known + sections)}"
    message: str = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{name}: {message}; got {_SHORT.repr(first['input'])}"

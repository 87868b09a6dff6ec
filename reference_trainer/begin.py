"""Checks and files of a run before its first step."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from reference_trainer import checkpoint, options
from reference_trainer.config import Config
from reference_trainer.data import open_windows
from reference_trainer.documents import sources
from reference_trainer.errors import UserError
from reference_trainer.files import fresh_directory
from reference_trainer.model import Llama
from reference_trainer.phase_model import prepare_
from reference_trainer.phases import phases
from reference_trainer.prepare import SPLITS, prepare, read_index, verify_data
from reference_trainer.pretrained import check_weights, copy_config, read_shape, shape_of
from reference_trainer.tokenizer import load_tokenizer

_MAY_CHANGE = ("runs", "name", "log.", "checkpoint.", "parallel.", "batch.micro")
_MAY_NOT = ("parallel.precision", "log.rank_sites")


def begun(config: Config) -> bool:
    """Whether there is a run in `config.directory`."""
    return (config.directory / "config.yaml").is_file()


def check(config: Config, *, processes: int, resume: bool) -> None:
    """Refuse, before anything is made, what can be seen to be wrong.

    Args:
        config: the run.
        processes: over how many.
        resume: whether it is to go on with a run that is there.

    Raises:
        UserError: for files, tokenizer, shape, targets, rank, batch or a missing extra.
    """
    config.batch.micro_steps(processes)
    config.parallel.mesh(processes)
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard needs the extra: pip install '.[tensorboard]'")
    if resume and not begun(config):
        raise UserError(f"{config.directory} holds no run to resume: start it without --resume")
    if not resume and not config.data.prepared:
        sources(config.data)
    shape = shape_of(config, vocab_size_of(config, resume=resume))
    for phase in phases(config):
        with torch.device("meta"):
            prepare_(Llama(shape), config, phase)


def check_begun_alike(config: Config) -> None:
    """Check that a run that is there was begun with the same options.

    Raises:
        UserError: if one that may not change is another; it names it.
    """
    begun_with = options.resolve(config.directory / "config.yaml", {})
    different = [path for path in options.changed(begun_with, config) if is_fixed(path)]
    if different:
        raise UserError(_begun_otherwise(config.directory, different))


def check_new(directory: Path) -> None:
    """Check that nothing is where a run is to be.

    Raises:
        UserError: if something is.
    """
    if directory.exists():
        raise UserError(
            f"{directory} holds a run already: --resume it, remove it, or give another --name"
        )


def vocab_size_of(config: Config, *, resume: bool) -> int:
    """Return how many ids there are: of the tokens that lie there, or of the tokenizer."""
    if resume or config.data.prepared:
        return read_index(config.data_directory).vocab_size
    return load_tokenizer(config.data.tokenizer).vocab_size


def open_directory(config: Config, *, resume: bool) -> None:
    """Make the run's directory with its tokens and its config.yaml, or find it there to resume.

    Raises:
        UserError: if another run is there, the one to resume was begun otherwise, or the data is
            too little. Nothing is left of a directory that was begun.
    """
    directory = config.directory
    if resume:
        check_begun_alike(config)
        verify_data(config.data_directory)
        config.checkpoints.mkdir(exist_ok=True)
        return
    check_new(directory)
    with fresh_directory(directory) as made:
        if config.model.weights:
            weights = Path(config.model.weights)
            check_weights(weights, read_shape(weights / "config.json"))
            copy_config(weights, made)
        data = Path(config.data.prepared) if config.data.prepared else made / "data"
        if config.data.prepared:
            verify_data(data)
        else:
            prepare(config.data, data)
        (made / config.checkpoints.name).mkdir()
        for split in SPLITS:
            open_windows(data, split, config.batch.length)
        options.write(config, made / "config.yaml")


def goes_on(config: Config) -> str:
    """Return the line that says how a run that was cut off goes on, and from where."""
    if not begun(config):
        return f"{config.directory} had not begun: start it again"
    found = checkpoint.complete(config.checkpoints)
    where = f"from {found[-1]}" if found else "from its beginning, as it has no checkpoint yet"
    runs = f" --runs {config.runs}" if config.runs != Config().runs else ""
    command = f"python -m reference_trainer train --resume --name {config.name}{runs}"
    return f"{config.directory} goes on {where}: {command}"


def fixed(config: Config) -> dict[str, Any]:
    """Return what may not change in a run, as JSON values by name: options, and the data's seal."""
    checksums = read_index(config.data_directory).checksums
    values = {path: value for path, value in options.values(config).items() if is_fixed(path)}
    known: dict[str, Any] = json.loads(json.dumps({**values, "data.checksums": checksums}))
    return known


def check_same(config: Config, position: checkpoint.Position) -> None:
    """Check that a checkpoint was written by the run that goes on from it.

    Raises:
        UserError: if it was begun with something else; it names what.
    """
    now, then = fixed(config), position.fixed
    different = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if different:
        raise UserError(_begun_otherwise(config.directory, different))


def is_fixed(path: str) -> bool:
    """Whether the option of this name may not change in a run."""
    return not path.startswith(_MAY_CHANGE) or path in _MAY_NOT


def _begun_otherwise(directory: Path, names: Iterable[str]) -> str:
    return (
        f"{directory} was begun with another {', '.join(names)} (see its config.yaml): "
        "resume it as it was, or give the new run another --name"
    )

"""The directory of a run: made whole, or found to be of the same run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reference_trainer import options
from reference_trainer.checkpoint.find import complete_checkpoints
from reference_trainer.checkpoint.format import Position
from reference_trainer.config import Config
from reference_trainer.data.index import SPLITS, Index, verify_data
from reference_trainer.data.prepare import prepare
from reference_trainer.data.windows import open_windows
from reference_trainer.errors import UserError
from reference_trainer.files import fresh_directory
from reference_trainer.pretrained import check_weights, copy_config, read_shape

_MAY_CHANGE = ("runs", "name", "log.", "checkpoint.", "parallel.", "batch.micro")
_MAY_NOT = ("parallel.precision", "log.rank_sites")


def begun(config: Config) -> bool:
    """Whether there is a run in `config.directory`."""
    return (config.directory / "config.yaml").is_file()


def check_new(directory: Path) -> None:
    """Check that the directory of a new run does not exist.

    Raises:
        UserError: if it exists.
    """
    if directory.exists():
        raise UserError(
            f"{directory} holds a run already: --resume it, remove it, or give another --name"
        )


def check_begun_alike(config: Config) -> None:
    """Check that an existing run was begun with the same options.

    Raises:
        UserError: if an option that may not change has changed; the message names it.
    """
    begun_with = options.resolve(config.directory / "config.yaml", {})
    different = [path for path in options.changed(begun_with, config) if is_fixed(path)]
    if different:
        raise UserError(_begun_otherwise(config.directory, different))


def open_directory(config: Config, index: Index | None, *, resume: bool) -> None:
    """Make the run's directory with its tokens and its config.yaml, or find it there to resume.

    Args:
        config: the run's options.
        index: the index of its tokens; None if they are still to be prepared.
        resume: whether an existing run is resumed.

    Raises:
        UserError: if another run is there, the run to resume was begun with other options, or there
            is too little data. A directory that was only partly made is removed.
    """
    if resume:
        check_begun_alike(config)
        verify_data(config.data_directory)
        config.checkpoints.mkdir(exist_ok=True)
        return
    check_new(config.directory)
    with fresh_directory(config.directory) as made:
        if config.model.weights:
            weights = Path(config.model.weights)
            check_weights(weights, read_shape(weights / "config.json"))
            copy_config(weights, made)
        data = made / "data" if index is None else config.data_directory
        if index is None:
            index = prepare(config.data, data)
        else:
            verify_data(data)
        (made / config.checkpoints.name).mkdir()
        for split in SPLITS:
            open_windows(data, index, split, config.batch.length)
        options.write(config, made / "config.yaml")


def goes_on(config: Config) -> str:
    """Return the line that says how an interrupted run is resumed, and from where."""
    if not begun(config):
        return f"{config.directory} had not begun: start it again"
    found = complete_checkpoints(config.checkpoints)
    where = f"from {found[-1]}" if found else "from its beginning, as it has no checkpoint yet"
    runs = f" --runs {config.runs}" if config.runs != Config().runs else ""
    command = f"python -m reference_trainer train --resume --name {config.name}{runs}"
    return f"{config.directory} continues {where}: {command}"


def fixed(config: Config, index: Index) -> dict[str, Any]:
    """Return the values, by name, that may not change in a run: options and data checksums."""
    values = {path: value for path, value in options.values(config).items() if is_fixed(path)}
    known: dict[str, Any] = json.loads(json.dumps({**values, "data.checksums": index.checksums}))
    return known


def check_same(config: Config, index: Index, position: Position) -> None:
    """Check that a checkpoint was written by the run that continues from it.

    Raises:
        UserError: if the values that may not change differ; the message names them.
    """
    now = fixed(config, index)
    then = fixed(Config(), index) | position.fixed  # an option newer than the run has its default
    different = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if different:
        raise UserError(_begun_otherwise(config.directory, different))


def is_fixed(path: str) -> bool:
    """Whether the option of this name may not change in a run."""
    return not path.startswith(_MAY_CHANGE) or path in _MAY_NOT


def _begun_otherwise(directory: Path, names: Iterable[str]) -> str:
    return (
        f"{directory} was begun with a different {', '.join(names)} (see its config.yaml): "
        "resume it as it was, or give the new run another --name"
    )

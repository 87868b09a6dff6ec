"""What is checked and made before the first step of a run."""

import importlib.util
from pathlib import Path

import torch

from reference_trainer import options
from reference_trainer.config import Config, phases
from reference_trainer.data import open_windows
from reference_trainer.documents import sources
from reference_trainer.errors import UserError
from reference_trainer.files import fresh_directory
from reference_trainer.model import Llama
from reference_trainer.prepare import SPLITS, prepare, read_index
from reference_trainer.stage import prepare_
from reference_trainer.tokenizer import load_tokenizer
from reference_trainer.world import world_size

_MAY_CHANGE = ("runs", "name", "log.", "checkpoint.", "parallel.", "batch.micro")
_MAY_NOT = ("parallel.precision", "log.rank_sites")


def check(config: Config, *, resume: bool) -> None:
    """Refuse, before anything is made, what can be seen to be wrong.

    Raises:
        UserError: for files, tokenizer, shape, targets, rank, batch or a missing extra.
    """
    config.batch.micro_steps(world_size())
    config.parallel.mesh(world_size())
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard needs the extra: pip install '.[tensorboard]'")
    if resume and not (config.directory / "config.yaml").is_file():
        raise UserError(f"{config.directory} holds no run to resume: start it without --resume")
    if resume or config.data.prepared:
        vocab_size = read_index(config.data_directory).vocab_size
    else:
        sources(config.data)
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    shape = config.model.shape(vocab_size)
    for phase in phases(config):
        with torch.device("meta"):
            prepare_(Llama(shape), config, phase)


def open_directory(config: Config, *, resume: bool) -> None:
    """Make the run's directory with its tokens and its config.yaml, or find it there to resume.

    Raises:
        UserError: if another run is there, the one to resume was begun otherwise, or the data is
            too little. Nothing is left of a directory that was begun.
    """
    directory = config.directory
    if resume:
        different = options.changed(options.resolve(directory / "config.yaml", {}), config)
        fixed = [p for p in different if not p.startswith(_MAY_CHANGE) or p in _MAY_NOT]
        if fixed:
            raise UserError(
                f"{directory} was begun with another {', '.join(fixed)} (see its config.yaml): "
                "resume it as it was, or give the new run another --name"
            )
        return
    if directory.exists():
        raise UserError(
            f"{directory} holds a run already: --resume it, remove it, or give another --name"
        )
    with fresh_directory(directory) as made:
        data = Path(config.data.prepared) if config.data.prepared else made / "data"
        if not config.data.prepared:
            prepare(config.data, data)
        for split in SPLITS:
            open_windows(data, split, config.batch.length)
        options.write(config, made / "config.yaml")

"""What is checked and made before the first step of a run."""

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


def check(config: Config) -> None:
    """Refuse, before anything is made, what can be seen to be wrong.

    Raises:
        UserError: for files, tokenizer, shape, targets, rank or batch.
    """
    config.batch.micro_steps(world_size())
    if config.data.prepared:
        vocab_size = read_index(Path(config.data.prepared)).vocab_size
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
        UserError: if another run is there, or none to resume, or the data is too little. A
            directory that was begun is removed then.
    """
    directory = config.directory
    file = directory / "config.yaml"
    if resume:
        if not file.is_file():
            raise UserError(f"{directory} holds no run to resume: start it without --resume")
        different = options.changed(options.resolve(file, {}), config)
        fixed = [path for path in different if not path.startswith(("log.", "checkpoint.", "runs"))]
        if fixed:
            raise UserError(
                f"{directory} was begun with another {', '.join(fixed)} (see its config.yaml): "
                "resume it as it was, or give the new run another --name"
            )
        return
    if directory.exists():
        raise UserError(f"{directory} holds a run already: --resume it, or give another --name")
    with fresh_directory(directory):
        if not config.data.prepared:
            prepare(config.data, directory / "data")
        for split in SPLITS:
            open_windows(config.data_directory, split, config.batch.length)
        options.write(config, file)

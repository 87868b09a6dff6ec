"""A run resolved and checked before anything of it is written."""

import importlib.util
import math
from dataclasses import dataclass

import torch

from reference_trainer.config import Config
from reference_trainer.data.documents import sources
from reference_trainer.data.index import Index, read_index
from reference_trainer.data.tokenizer import load_tokenizer
from reference_trainer.errors import UserError
from reference_trainer.model.llama import Llama, LlamaShape
from reference_trainer.phase_model import prepare_
from reference_trainer.phases import Phase, phases
from reference_trainer.pretrained import shape_of
from reference_trainer.run_directory import begun
from relora_core import low_rank_sites


@dataclass(frozen=True)
class Numbers:
    """The number of entries in the tensors of a phase.

    Args:
        bases: frozen entries, in the W of low-rank sites.
        copies: entries in the merged copies of these W, if they are kept.
        factors: trained entries in A and B.
        others: all other trained entries.
        sites: the number of low-rank sites.
        bound: the highest rank that the sum of all cycles' updates can reach at any site.
    """

    bases: int
    copies: int
    factors: int
    others: int
    sites: int
    bound: int

    @property
    def trained(self) -> int:
        """All trained entries."""
        return self.factors + self.others


@dataclass(frozen=True)
class Plan:
    """A run's options, and all that follows from them and from its data.

    Args:
        config: the run's options.
        processes: the number of processes.
        resume: whether an existing run is resumed.
        index: the index of its tokens; None if they are still to be prepared.
        shape: the shape of its model.
        phases: its phases in order, each with its numbers of entries.
    """

    config: Config
    processes: int
    resume: bool
    index: Index | None
    shape: LlamaShape
    phases: dict[Phase, Numbers]


def preflight(config: Config, *, processes: int, resume: bool) -> Plan:
    """Resolve a run, and check everything that can be checked before any file is made.

    Args:
        config: the run's options.
        processes: the number of processes.
        resume: whether an existing run is to be resumed.

    Raises:
        UserError: if files, tokenizer, shape, targets, rank or batch are wrong, or an extra is
            missing.
    """
    config.batch.micro_steps(processes)
    config.parallel.mesh(processes)
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard needs the extra: pip install '.[tensorboard]'")
    if resume and not begun(config):
        raise UserError(f"{config.directory} holds no run to resume: start it without --resume")
    if resume or config.data.prepared:
        index = read_index(config.data_directory)
        vocab_size = index.vocab_size
    else:
        index = None
        sources(config.data)
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    shape = shape_of(config, vocab_size)
    counted = {phase: count(config, shape, phase) for phase in phases(config)}
    return Plan(config, processes, resume, index, shape, counted)


def count(config: Config, shape: LlamaShape, phase: Phase) -> Numbers:
    """Count what a phase trains and what it freezes, on the meta device.

    Raises:
        UserError: if a target matches nothing or the rank does not fit.
    """
    with torch.device("meta"):
        model = Llama(shape)
        prepare_(model, config, phase)
    sites = [site for _, site in low_rank_sites(model)]
    factors = sum(site.lora_A.numel() + site.lora_B.numel() for site in sites)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bounds = [min(*site.weight.shape, phase.cycles * site.rank) for site in sites]
    bases = sum(site.weight.numel() for site in sites)
    copies = sum(math.prod(site.low_rank.copy_shape(site.weight)) for site in sites)
    return Numbers(bases, copies, factors, trained - factors, len(sites), max(bounds, default=0))

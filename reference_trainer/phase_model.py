"""The model of a phase: its low-rank sites, and how their weights are kept."""

import torch
from torch import nn

import relora_core as relora
from reference_trainer.config import Config
from reference_trainer.distributed import World
from reference_trainer.errors import UserError
from reference_trainer.model.llama import Llama, LlamaShape
from reference_trainer.parallelize import build, compute_dtype
from reference_trainer.phases import Phase


def keeps_merged(config: Config, device: torch.device) -> bool:
    """Whether the low-rank phase computes over merged copies (`relora_core.keep_merged_`).

    It does if W is kept in fp32 and the computation is narrower. According to `bench roofline`, no
    other form is faster from 350m on.
    """
    return config.relora.base == "keep" and compute_dtype(config.parallel, device) != torch.float32


def build_model(
    config: Config, phase: Phase, shape: LlamaShape, world: World, *, merged: bool = True
) -> Llama:
    """Build a phase's model, sharded, on the meta device; see `build_state`.

    Raises:
        UserError: if W would be narrower than the computation.
    """
    parallel, dtype = config.parallel, compute_dtype(config.parallel, world.device)
    whole = parallel.layout == "replicate"
    if config.relora.base == "bf16" and dtype == torch.float32:
        raise UserError(
            "relora.base=bf16 needs a computation in bf16; parallel.precision=auto is fp32 on a CPU"
        )

    def prepared(bare: nn.Module) -> list[nn.Parameter]:
        prepare_(bare, config, phase)
        if not phase.low_rank:
            return []
        sites = [site for _, site in relora.low_rank_sites(bare)]
        linear = any(isinstance(site.module, nn.Linear) for site in sites)
        if linear and merged and keeps_merged(config, world.device):
            return keep_copies_(bare, world, dtype=dtype, whole=whole)
        if whole and dtype != torch.float32:  # FSDP2 casts only what it gathers, so not these
            relora.split_bases_(bare)
        return [site.weight for site in sites] if whole else []

    return build(shape, parallel, world, prepared)


def keep_copies_(
    bare: nn.Module, world: World, *, dtype: torch.dtype, whole: bool
) -> list[nn.Parameter]:
    """Keep merged copies of a bare model's linear sites; return what FSDP2 must ignore.

    Args:
        bare: the model, with low-rank sites.
        world: the processes, over whose mesh W is sharded.
        dtype: the dtype of the copies.
        whole: whether the copies stay whole on every process, outside FSDP2.
    """
    bases = relora.keep_merged_(bare, dtype=dtype, mesh=world.mesh)
    copies = [site.low_rank.merged_copy for _, site in relora.low_rank_sites(bare)]
    return bases + [copy for copy in copies if whole and copy is not None]


def prepare_(model: nn.Module, config: Config, phase: Phase) -> None:
    """Turn the bare model into the one that the phase trains.

    Raises:
        UserError: if a target matches nothing or the rank does not fit.
    """
    if phase.low_rank:
        options = config.relora
        try:
            relora.add_low_rank_(
                model, options.targets, rank=options.rank, alpha=options.alpha, seed=config.seed
            )
        except ValueError as error:
            raise UserError(f"relora: {error}") from None

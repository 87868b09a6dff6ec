"""Averages of merged weights, kept by torch's AveragedModel.

An average of W, A and B apart is none of W + s B A: a mean of products is not the product of the
means, and after a restart A is another one. So an AveragedModel of a model with low-rank sites
averages W + s B A, in the place of W, beside a B of zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from relora_core.sites import low_rank_sites


class _MergedFirst:
    """The part of an AveragedModel's class that gives its rule merged weights."""

    def update_parameters(self, model: nn.Module) -> None:
        """Take the merged weights of `model` into the average.

        Raises:
            ValueError: if a W is split into 16 bits and those below, in which no average adds up.
        """
        # mypy does not see the class that stands behind this one.
        super().update_parameters(_Merged(model))  # type: ignore[misc]


class AveragedSites(_MergedFirst, AveragedModel):
    """An AveragedModel of a model with low-rank sites; nothing but its class tells."""


class _Merged:
    """What an AveragedModel asks a model for, with W + s B A for W and zero for B."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def parameters(self) -> Iterator[Tensor]:
        """Iterate over the parameters in the model's order, the merged ones in place of W."""
        sites = [site for _, site in low_rank_sites(self.model)]
        if any(site.low_rank.split_from is not None for site in sites):
            raise ValueError(
                "an average over bases that split_bases_ has split would be rounded to 16 bits at "
                "each update: keep W in float32 to average it"
            )
        merged = {id(site.weight): site for site in sites}
        zero = {id(site.lora_B) for site in sites}
        for p in self.model.parameters():
            if id(p) in merged:
                yield merged[id(p)].merged()
            else:
                yield torch.zeros_like(p) if id(p) in zero else p

    def buffers(self) -> Iterator[Tensor]:
        """Iterate over the model's buffers."""
        return self.model.buffers()


def _average_merged(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Give an AveragedModel that is being made of a model with sites the class that merges."""
    if not isinstance(module, AveragedModel) or isinstance(module, _MergedFirst):
        return
    if name != "module" or submodule is None or not any(low_rank_sites(submodule)):
        return
    own = type(module)
    of_sites = (
        AveragedSites if own is AveragedModel else type(own.__name__, (_MergedFirst, own), {})
    )
    module.__class__ = of_sites


register_module_module_registration_hook(_average_merged)

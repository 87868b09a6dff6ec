"""Averages of merged weights, kept by torch's AveragedModel.

Averaging W, A and B separately does not give the average of W + s B A: a mean of products is not
the product of the means, and a restart draws a new A. So an AveragedModel averages W + s B A. It
stores the average in W's place, with B zero, or in the plain weight if it was made before the site.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from relora_core.sites.site import clean_name, low_rank_sites, plain_name, unwrapped


class _Merged:
    """A model as an AveragedModel reads it, with W + s B A in place of W and zero in place of B."""

    def __init__(self, model: nn.Module, averaged: nn.Module) -> None:
        self.model = unwrapped(model)
        self.averaged = unwrapped(averaged)

    @torch.no_grad()
    def parameters(self) -> Iterator[Tensor]:
        """Iterate over the new value for each parameter of the average, in the average's order."""
        # The whole list first, so that an error leaves the average unchanged.
        return iter(list(self._parameters()))

    def _parameters(self) -> Iterator[Tensor]:
        sites = {id(site.weight): site for _, site in low_rank_sites(self.model)}
        if any(site.low_rank.split_from is not None for site in sites.values()):
            raise ValueError(
                "an average over bases that split_bases_ has split would be rounded to 16 bits at "
                "each update: keep W in float32 to average it"
            )
        given = {
            plain_name(clean_name(name)): p
            for name, p in self.model.named_parameters(remove_duplicate=False)
        }
        averaged = [site for _, site in low_rank_sites(self.averaged)]
        zero = {id(site.lora_B) for site in averaged}
        factors = {id(p) for site in averaged for p in site.low_rank.parameters()}
        for name, p in self.averaged.named_parameters():
            found = given.get(plain_name(clean_name(name)), p if id(p) in factors else None)
            if found is None or found.shape != p.shape:
                now = "lacks it" if found is None else f"has it with shape {tuple(found.shape)}"
                raise ValueError(
                    f"the average has {name} with shape {tuple(p.shape)}, but "
                    f"{type(self.model).__name__} {now}: give the model that was averaged"
                )
            site = sites.get(id(found))
            if site is not None:
                yield site.merged()
            else:
                yield torch.zeros_like(found) if id(p) in zero else found

    def buffers(self) -> Iterator[Tensor]:
        """Iterate over the model's buffers."""
        return self.model.buffers()


_update = AveragedModel.update_parameters


def _update_merged(self: AveragedModel, model: nn.Module) -> None:
    """Update the average with the parameters of `model`, merged at its low-rank sites.

    Raises:
        ValueError: if a W is split (`split_bases_`), because its average would be rounded to 16
            bits; if a merge was interrupted; if `model` lacks a parameter that the average has.
    """
    if any(low_rank_sites(model)) or any(low_rank_sites(self.module)):
        # torch's update reads nothing else of a model.
        _update(self, cast("nn.Module", _Merged(model, self.module)))
    else:
        _update(self, model)


# This replaces torch's own method. A subclass would miss averages that are copied, unpickled or
# older than the sites. Without sites it does what torch's method does.
AveragedModel.update_parameters = _update_merged  # type: ignore[method-assign]  # as said

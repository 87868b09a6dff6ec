"""Averages of merged weights, kept by torch's AveragedModel.

Averages of W, A and B apart do not make the average of W + s B A: a mean of products is not the
product of the means, and a restart draws another A. So an AveragedModel averages W + s B A, in the
place of W and beside a B of zero, or of the plain weight where it was made before the site.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from relora_core.sites.site import clean_name, low_rank_sites, plain_name, unwrapped


class _Merged:
    """What an AveragedModel asks a model for, with W + s B A for W and zero for B."""

    def __init__(self, model: nn.Module, averaged: nn.Module) -> None:
        self.model = unwrapped(model)
        self.averaged = unwrapped(averaged)

    @torch.no_grad()
    def parameters(self) -> Iterator[Tensor]:
        """Iterate over what goes into each parameter of the average, in its order."""
        # All of it first: a refusal leaves the average as it is.
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
                now = "not" if found is None else f"one of shape {tuple(found.shape)}"
                raise ValueError(
                    f"the average has {name}, {tuple(p.shape)}, and {type(self.model).__name__} "
                    f"has {now}: give the model that it is the average of"
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
    """Take the parameters of `model` into the average, merged where there are low-rank sites.

    Raises:
        ValueError: if a W is split into 16 bits and those below, in which no average adds up; if a
            merge was broken off; if `model` lacks a parameter that the average has.
    """
    if any(low_rank_sites(model)) or any(low_rank_sites(self.module)):
        # It asks for nothing else of a model.
        _update(self, cast("nn.Module", _Merged(model, self.module)))
    else:
        _update(self, model)


# In place of torch's own: an average may be a copy, unpickled, or older than the sites, so that no
# class of ours would be its. Without sites it is torch's.
AveragedModel.update_parameters = _update_merged  # type: ignore[method-assign]  # as said

"""Averages of merged weights, kept by torch's AveragedModel.

Averages of W, A and B apart do not make the average of W + s B A: a mean of products is not the
product of the means, and a restart draws another A. So an AveragedModel averages W + s B A, in the
place of W and beside a B of zero, or of the plain weight where it was made before the site.
"""

from collections.abc import Iterator
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from relora_core.low_rank import LowRank
from relora_core.sites import clean_name, low_rank_sites, plain_name, unwrapped


class _MergedFirst:
    """The part of an AveragedModel's class that gives its rule merged weights."""

    module: nn.Module

    def update_parameters(self, model: nn.Module) -> None:
        """Take the merged weights of `model` into the average.

        Raises:
            ValueError: if a W is split into 16 bits and those below, in which no average adds up;
                if `model` lacks a parameter that the average has.
        """
        has_sites = any(low_rank_sites(model)) or any(low_rank_sites(self.module))
        # mypy does not see the class that stands behind this one.
        super().update_parameters(_Merged(model, self.module) if has_sites else model)  # type: ignore[misc]


class AveragedSites(_MergedFirst, AveragedModel):
    """An AveragedModel of a model with low-rank sites; nothing but its class tells."""


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
        averaged = {id(site.low_rank): site for _, site in low_rank_sites(self.averaged)}
        zero = {id(site.lora_B) for site in averaged.values()}
        factors = {id(p) for site in averaged.values() for p in site.low_rank.parameters()}
        for name, p in self.averaged.named_parameters():
            found = given.get(plain_name(clean_name(name)), p if id(p) in factors else None)
            if found is None:
                raise ValueError(
                    f"the average has {name}, and {type(self.model).__name__} has not: give the "
                    "model that it is the average of"
                )
            site = sites.get(id(found))
            if site is not None:
                yield site.merged()
            else:
                yield torch.zeros_like(found) if id(p) in zero else found

    def buffers(self) -> Iterator[Tensor]:
        """Iterate over the model's buffers."""
        return self.model.buffers()


# Those that were made of models without sites, which may get some.
_plain: WeakSet[AveragedModel] = WeakSet()


def _average_merged(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Give an AveragedModel the class that merges, once there is a site to merge."""
    if isinstance(submodule, LowRank):
        for averaged in list(_plain):
            _give_class(averaged)
        _plain.clear()
    elif isinstance(module, AveragedModel) and name == "module" and submodule is not None:
        if any(low_rank_sites(submodule)):
            _give_class(module)
        else:
            _plain.add(module)


def _give_class(averaged: AveragedModel) -> None:
    own = type(averaged)
    if not issubclass(own, _MergedFirst):
        of_sites = type(own.__name__, (_MergedFirst, own), {})
        averaged.__class__ = AveragedSites if own is AveragedModel else of_sites


register_module_module_registration_hook(_average_merged)

"""The low-rank sites of a model under test, and their exact values."""

import copy
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from relora_core.sites.site import Site, low_rank_sites


class PropertyError(AssertionError):
    """A property does not hold; a check names it and shows the smallest failing case as code."""


@runtime_checkable
class LowRankSite(Protocol):
    """A low-rank site, one weight W + s B A: this library's, or a layer of your own.

    `find_sites` finds a module that has these attributes. For one with other names, write a class
    that wraps it and has these; `sites=` takes a function that returns such objects by name.

    `weight` is W, `(out, ...)`; `lora_A` is A, `(rank, in)`, `in` being the product of W's other
    dimensions; `lora_B` is B, `(out, rank)`; `scale` is s. All three tensors are Parameters (or
    buffers) of the module. `merge_()` adds s B A to W and zeroes B; `redraw_()` draws a new A and
    zeroes B.
    """

    @property
    def weight(self) -> Tensor:
        """W."""

    @property
    def lora_A(self) -> Tensor:
        """A."""

    @property
    def lora_B(self) -> Tensor:
        """B."""

    @property
    def scale(self) -> float | Tensor:
        """The scale s."""

    def merge_(self) -> None:
        """Add s B A to W, and zero B."""

    def redraw_(self) -> None:
        """Draw the next A, and zero B."""


Sites = Callable[[nn.Module], Mapping[str, LowRankSite]]


def find_sites(model: nn.Module) -> dict[str, LowRankSite]:
    """Return a model's sites by name: this library's, and every module that is a `LowRankSite`.

    Raises:
        ValueError: if the model has no site.

    Examples:
        >>> from relora_core import register_low_rank
        >>> model = nn.Sequential(nn.Linear(4, 4), register_low_rank(nn.Linear(4, 3), rank=1))
        >>> list(find_sites(model))
        ['1']
    """
    found: dict[str, LowRankSite] = dict(low_rank_sites(model))
    for name, module in model.named_modules():
        if isinstance(module, LowRankSite):
            found[name] = module
    if not found:
        raise ValueError(
            "the model must have a low-rank site; got none: call add_low_rank_ in its factory, or "
            "pass sites=, a function that returns {name: site} for your layers (see LowRankSite)"
        )
    return found


def has_sites(model: nn.Module) -> bool:
    """Whether `find_sites` finds any."""
    ours = any(low_rank_sites(model))
    return ours or any(isinstance(module, LowRankSite) for module in model.modules())


def trained_scale(site: LowRankSite) -> nn.Parameter | None:
    """Return s as a Parameter if the site trains its scale, else None."""
    return site.low_rank.lora_scale if isinstance(site, Site) else None


def scale_of(site: LowRankSite) -> float:
    """Return s as a number."""
    s = site.scale
    return float(s.detach()) if isinstance(s, Tensor) else s


def exact_weight(site: LowRankSite) -> Tensor:
    """Return a float64 copy of W; of a split W, the value of both halves together."""
    W = site.exact() if isinstance(site, Site) else site.weight
    return W.detach().to(torch.float64, copy=True)


def exact_update(site: LowRankSite) -> Tensor:
    """Return s B A in float64 and in W's shape, detached."""
    A, B = site.lora_A.detach().double(), site.lora_B.detach().double()
    return (scale_of(site) * (B @ A)).view(site.weight.shape)


def fill_B_(site: LowRankSite, seed: int) -> None:
    """Fill B with standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        site.lora_B.copy_(torch.randn(site.lora_B.shape, generator=generator))


def wide_copy(model: nn.Module) -> nn.Module:
    """Return a copy in float64 and `eval` mode, so that rounding cannot hide an error."""
    twin = copy.deepcopy(model)
    sites = [site for _, site in low_rank_sites(twin)]
    exact = [exact_weight(site) for site in sites]
    for site in sites:
        site.low_rank._unsplit_(site.weight)
    twin.double().eval()
    for site, value in zip(sites, exact, strict=True):
        site.weight.data.copy_(value)
    return twin

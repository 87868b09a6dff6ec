"""The restart: the inner block of Algorithm 1 as one call that does everything or nothing."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core._sharding import full
from relora_core.linear import autocasts
from relora_core.pruning import to_floats
from relora_core.reset import Masks, Reset, ResetReport, Rule, apply_reset_, plan_reset
from relora_core.sites import Site, sites_of


@dataclass(frozen=True)
class RestartReport:
    """What a restart did.

    Args:
        update_norms: for each site's name the Frobenius norm of the s B A that was merged.
        reset: how much of the optimizer's moments was zeroed.
    """

    update_norms: dict[str, float]
    reset: ResetReport

    @property
    def sites(self) -> int:
        """How many sites were merged and redrawn."""
        return len(self.update_norms)

    @property
    def zeroed_fraction(self) -> float:
        """The fraction of the adapters' moments that was zeroed, exactly."""
        return self.reset.zeroed_fraction


def restart_(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    prune_ratio: float = 0.99,
    masks: Masks = "joint",
    rule: Rule = "magnitude",
    reset_step: bool = False,
) -> RestartReport:
    r"""Merge, redraw and prune: $W \leftarrow W + s B A$, $A \leftarrow$ new, $B \leftarrow 0$.

    The function stays; the moments of every $A$ and $B$ are pruned. Call it before the step at
    which `Restarts.at` is true: `JaggedLR` makes that step's learning rate zero, so it only
    refills the moments. Every rank must call it.

    Args:
        model: with low-rank sites, sharded or not.
        optimizer: that holds the sites' factors; any wrapper `reset_optimizer_` accepts.
        prune_ratio: fraction of the factors' moments to zero, from 0 to 1.
        masks: "joint" or "independent", see `reset_optimizer_`.
        rule: "magnitude", or "random", keyed by each site's seed, name and restart.
        reset_step: whether the factors' step counts begin anew, see `reset_optimizer_`.

    Returns:
        A `RestartReport`.

    Raises:
        ValueError: if there is no site, a factor is not finite, or the reset refuses. Nothing is
            changed then.

    Example:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> restart_(model, optimizer).sites
        1

    Reference: https://arxiv.org/abs/2307.05695, Algorithm 1, lines 8 to 12.
    """
    reset = Reset(prune_ratio, masks, rule, reset_step)
    sites = sites_of(model)
    factors = {
        f"{site.low_rank.seed}/{name}/{site.restart}/{which}": factor
        for name, site in sites
        for which, factor in (("lora_A", site.lora_A), ("lora_B", site.lora_B))
        if factor.requires_grad
    }
    states = plan_reset(optimizer, factors.values(), reset)
    norms = update_norms(sites)
    _refuse_overflow(sites, norms)

    for _, site in sites:
        site.merge_()
        site.redraw_()
    return RestartReport(norms, apply_reset_(states, reset, list(factors)))


@torch.no_grad()
def update_norms(sites: list[tuple[str, Site]]) -> dict[str, float]:
    """Return the Frobenius norm of s B A for each site, without forming it.

    It is sqrt(s² tr((Bᵀ B)(A Aᵀ))), from two r x r products; not finite if a factor is not.
    """
    squares = to_floats([_squared_norm(site).clamp(min=0) for _, site in sites])  # rounding: -0
    return {name: math.sqrt(square) for (name, _), square in zip(sites, squares, strict=True)}


def _refuse_overflow(sites: list[tuple[str, Site]], norms: dict[str, float]) -> None:
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        raise ValueError(
            f"the update of {len(broken)} sites is not finite (first: {broken[0]}): go back to a "
            "checkpoint from before, and skip steps whose gradients are not finite"
        )
    # No entry of s B A exceeds its norm. Only fp16 has so little range that it matters.
    half = [(name, site.weight) for name, site in sites if site.weight.dtype == torch.float16]
    largest = to_floats([full(weight.detach().abs().max()).float() for _, weight in half])
    for (name, _), entry in zip(half, largest, strict=True):
        if entry + norms[name] > torch.finfo(torch.float16).max:
            raise ValueError(
                f"{name}: a merge of an update of norm {norms[name]:g} into a float16 weight may "
                "overflow: store W in float32 or bfloat16"
            )


def _squared_norm(site: Site) -> Tensor:
    if autocasts(site.lora_A.device.type):
        with torch.autocast(site.lora_A.device.type, enabled=False):
            return _squared_norm(site)
    lazy = site.low_rank(site.weight)
    wide = torch.promote_types(lazy.lora_A.dtype, torch.float32)
    A, B = lazy.lora_A.to(wide), lazy.lora_B.to(wide)
    square: Tensor = lazy.scale**2 * (full(A @ A.t()) * full(B.t() @ B)).sum()
    return square

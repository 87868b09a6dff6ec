"""The restart: the inner block of Algorithm 1 as one call that does everything or nothing."""

import math
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core._sharding import full, shard_sum, sharding
from relora_core.pruning import to_floats
from relora_core.reset import Masks, Reset, ResetReport, Rule, apply_reset_, plan_reset
from relora_core.roll_call import roll_call
from relora_core.sites import Site, sites_of
from relora_core.update import Update


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
    timeout: timedelta = timedelta(minutes=10),
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
        timeout: how long the processes that share the model (FSDP2, DDP, tensor parallelism) wait
            for each other.

    Returns:
        A `RestartReport`.

    Raises:
        ValueError: if there is no site, a factor is not finite, or the reset refuses. Nothing is
            changed then.
        RuntimeError: if a process does not call it in time, or otherwise than the others; it names
            them. Nothing is changed then.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> restart_(model, optimizer).sites
        1

    Reference: https://arxiv.org/abs/2307.05695, Algorithm 1, lines 8 to 12.
    """
    reset = Reset(prune_ratio, masks, rule, reset_step)
    sites = sites_of(model)
    roll_call(model, _call(sites, reset), timeout)
    factors = {
        f"{site.low_rank.seed}/{name}/{site.restart}/{which}": factor
        for name, site in sites
        for which, factor in (("lora_A", site.lora_A), ("lora_B", site.lora_B))
        if factor.requires_grad
    }
    states = plan_reset(optimizer, factors.values(), reset)
    updates = [site.update() for _, site in sites]
    norms = update_norms(sites, updates)
    refuse_overflow(sites, norms)

    for (_, site), update in zip(sites, updates, strict=True):
        site.merge_(update)
        site.redraw_()
    return RestartReport(norms, apply_reset_(states, reset, list(factors)))


@torch.no_grad()
def update_norms(sites: list[tuple[str, Site]], updates: list[Update]) -> dict[str, float]:
    """Return the Frobenius norm of s B A for each site; not finite if a factor is not.

    Sites that are sharded over the same processes share one collective.
    """
    together: dict[object, list[int]] = {}
    for index, (_, site) in enumerate(sites):
        place = (sharding(site.weight), site.weight.device, updates[index].A.dtype)
        together.setdefault(place, []).append(index)
    squares: dict[int, Tensor] = {}
    for members in together.values():
        own = torch.stack([updates[index].square() for index in members])
        squares |= dict(zip(members, shard_sum(own, sites[members[0]][1].weight), strict=True))
    values = to_floats([squares[index].clamp(min=0) for index in range(len(sites))])  # rounding: -0
    return {name: math.sqrt(square) for (name, _), square in zip(sites, values, strict=True)}


def _call(sites: list[tuple[str, Site]], reset: Reset) -> str:
    keys = [(name, site.rank, site.low_rank.seed, site.restart) for name, site in sites]
    which = blake2b(str(keys).encode(), digest_size=4).hexdigest()
    number = sites[0][1].restart + 1
    return f"restart_ number {number} of {len(sites)} sites ({which}) by {reset}"


def refuse_overflow(sites: list[tuple[str, Site]], norms: dict[str, float]) -> None:
    """Raise ValueError if a merge of updates of these norms would not be finite."""
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

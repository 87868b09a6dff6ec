"""The restart: the inner block of Algorithm 1 as one call that does everything or nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core._sharding import local, shard_max, shard_sum, sharding
from relora_core.pruning import to_floats
from relora_core.reset import (
    Masks,
    Reset,
    ResetReport,
    Rule,
    apply_reset_,
    plan_reset,
    refuse_nan,
)
from relora_core.roll_call import agreed
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
        OutOfStepError: if a process does not call it in time, or otherwise than the others, or
            refuses alone; it names them. Nothing is changed then, on any process.

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
    call = _call(sites, reset)
    factors = {
        f"{site.low_rank.seed}/{name}/{site.restart}/{which}": factor
        for name, site in sites
        for which, factor in (("lora_A", site.lora_A), ("lora_B", site.lora_B))
        if factor.requires_grad
    }
    with agreed(model, call, timeout):  # before any communication
        states = plan_reset(optimizer, factors.values(), reset)
    with agreed(model, call, timeout):  # of what only one of them may see
        refuse_nan(states)
        updates = [site.update() for _, site in sites]
        norms = update_norms(sites, updates)
        refuse_overflow(sites, norms)

    for (_, site), update in zip(sites, updates, strict=True):
        site.low_rank.merge_and_redraw_(site.weight, update)
    return RestartReport(norms, apply_reset_(states, reset, list(factors)))


@torch.no_grad()
def update_norms(sites: list[tuple[str, Site]], updates: list[Update]) -> dict[str, float]:
    """Return the Frobenius norm of s B A for each site; not finite if a factor is not.

    Sites that are sharded over the same processes share one collective.
    """
    squares = _over_shards(sites, [update.square() for update in updates], shard_sum)
    roots = [math.sqrt(max(square, 0.0)) for square in squares]  # rounded below 0; NaN stays NaN
    return {name: root for (name, _), root in zip(sites, roots, strict=True)}


def _over_shards(
    sites: list[tuple[str, Site]],
    values: list[Tensor],
    reduced: Callable[[Tensor, Tensor], Tensor],
) -> list[float]:
    """Return a scalar of each site, reduced over the processes that the site's W is split over."""
    together: dict[object, list[int]] = {}
    for index, (_, site) in enumerate(sites):
        place = (sharding(site.weight), values[index].device, values[index].dtype)
        together.setdefault(place, []).append(index)
    found: dict[int, Tensor] = {}
    for members in together.values():
        own = torch.stack([values[index] for index in members])
        found |= dict(zip(members, reduced(own, sites[members[0]][1].weight), strict=True))
    return to_floats([found[index] for index in range(len(sites))])


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
    half = [(name, site) for name, site in sites if site.weight.dtype == torch.float16]
    own = [_largest(local(site.weight.detach())) for _, site in half]
    for (name, _), entry in zip(half, _over_shards(half, own, shard_max), strict=True):
        if entry + norms[name] > torch.finfo(torch.float16).max:
            raise ValueError(
                f"{name}: a merge of an update of norm {norms[name]:g} into a float16 weight may "
                "overflow: store W in float32 or bfloat16"
            )


def _largest(part: Tensor) -> Tensor:
    """Return the largest magnitude; 0 of a process's part that is empty."""
    return part.abs().max().float() if part.numel() else part.new_zeros((), dtype=torch.float32)

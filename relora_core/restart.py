"""The restart: the inner block of Algorithm 1 as one call that does everything or nothing."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b

import torch
from torch import Tensor, nn

from relora_core.distributed.consensus import agreed
from relora_core.distributed.fsdp import unreduced_gradients
from relora_core.distributed.local import local
from relora_core.distributed.sharding import shard_max, shard_sum, sharding
from relora_core.low_rank.ties import Owners, owned_by, refuse_ties
from relora_core.optim.moments import Optimizers, held_by, optimizers_of
from relora_core.optim.pruning import to_floats
from relora_core.optim.reset import (
    Masks,
    Reset,
    ResetReport,
    Rule,
    apply_reset_,
    plan_reset,
    refuse_nan,
)
from relora_core.optim.stepped import passed_over, was_stepped
from relora_core.products.delta import Delta
from relora_core.sites.site import Site, sites_of


@dataclass(frozen=True)
class RestartReport:
    """What a restart did.

    Args:
        update_norms: the Frobenius norm of the s B A that was merged, by the site's name.
        reset: how much of the optimizer's moments was zeroed.
        idle: names of idle sites: their B was still zero, although another site's B was not, or
            although the optimizer that holds them has stepped other parameters.
    """

    update_norms: dict[str, float]
    reset: ResetReport
    idle: tuple[str, ...] = ()

    @property
    def sites(self) -> int:
        """How many sites were merged and redrawn."""
        return len(self.update_norms)

    @property
    def zeroed_fraction(self) -> float:
        """The fraction of the factors' moments that was zeroed, exactly."""
        return self.reset.zeroed_fraction


def restart_(
    model: nn.Module,
    optimizer: Optimizers,
    *,
    prune_ratio: float = 0.99,
    masks: Masks = "joint",
    rule: Rule = "magnitude",
    reset_step: bool = False,
    timeout: timedelta = timedelta(minutes=10),
) -> RestartReport:
    r"""Merge, redraw and prune: $W \leftarrow W + s B A$, $A \leftarrow$ new, $B \leftarrow 0$.

    The model's function does not change; the moments of every $A$ and $B$ are pruned. Call this
    before the step at which `Restarts.at` is true: `JaggedLR` makes that step's learning rate zero,
    so that step only refills the moments. Every process must call this, after a step and before the
    next backward. Gradients that the last step left on the factors are zeroed.

    If a restart was interrupted after its first write (by Ctrl-C, or out of memory), the next call
    finishes it and keeps the function. If it was interrupted between the two writes of one merge,
    or at different points on different processes, every later call and every export is an error.

    Args:
        model: a model with low-rank sites, sharded or not.
        optimizer: the optimizer that holds the sites' factors, wrapped in any way that
            `reset_optimizer_` accepts; or a list, tuple or dict of several.
        prune_ratio: the fraction of the factors' moments to zero, from 0 to 1.
        masks: "joint" or "independent", see `reset_optimizer_`.
        rule: "magnitude", or "random", keyed by each site's seed, name and restart number.
        reset_step: whether the factors' step counts start again, see `reset_optimizer_`.
        timeout: how long the processes that share the model (FSDP2, DDP, tensor parallelism) wait
            for each other.

    Returns:
        A `RestartReport`.

    Raises:
        ValueError: if there is no site; if a factor is not finite, or has a gradient that no step
            of a torch optimizer has used; if W is tied, trained, or has no memory (meta,
            offloaded); or if `reset_optimizer_` would raise. Nothing is changed then.
        OutOfStepError: if a process does not call this in time, calls it with other arguments, or
            alone raises an error; the message names the process. No process changes anything then.

    Warns:
        UserWarning: if nothing has trained some sites, which `RestartReport.idle` names.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        >>> restart_(model, optimizer).sites
        1

    Reference: https://arxiv.org/abs/2307.05695, Algorithm 1, lines 8 to 12.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module; got {type(model).__name__}")
    reset = Reset(prune_ratio, masks, rule, reset_step)
    sites = sites_of(model)
    numbers = {name: _number(site) for name, site in sites}
    call = _call(sites, numbers, reset)
    factors = {
        f"{site.low_rank.seed}/{name}/{numbers[name]}/{which}": factor
        for name, site in sites
        for which, factor in (("lora_A", site.lora_A), ("lora_B", site.lora_B))
    }
    trained = [factor for factor in factors.values() if factor.requires_grad]
    with agreed(model, call, timeout):  # before any communication
        _refuse_sites(model, sites)
        optimizers = optimizers_of(optimizer)
        frozen = [factor for factor in factors.values() if not factor.requires_grad]
        kept = {id(p) for p in (*trained, *held_by(optimizers, frozen))}
        factors = {key: factor for key, factor in factors.items() if id(factor) in kept}
        states = plan_reset(optimizers, factors.values(), reset)
    with agreed(model, call, timeout):  # for errors that only some processes may see
        refuse_nan(states)
        _refuse_gradients(sites)
        updates = [site._delta() for _, site in sites]
        norms = update_norms(sites, updates)
        refuse_overflow(sites, norms)

    hidden = passed_over(p for p in factors.values() if p.requires_grad)
    finishes = any(site.low_rank.restarting is not None for _, site in sites)
    for name, site in sites:
        site.low_rank.restarting = numbers[name] + 1
        for grad in _gradients(site):  # of the old factors; a step has used them
            grad.zero_()
    for (name, site), update in zip(sites, updates, strict=True):
        # If a restart was interrupted, its redrawn sites are done, unless trained since then.
        if site.restart == numbers[name] or norms[name]:
            site.low_rank._merge_and_redraw_(site.weight, update)
    done = apply_reset_(states, reset, list(factors))
    for _, site in sites:
        site.low_rank.restarting = None
    trainable = {name: norms[name] for name, site in sites if site.is_trainable}
    return RestartReport(norms, done, () if finishes else _idle(trainable, hidden))


def _number(site: Site) -> int:
    """Return how many redraws a site had before this restart, which may be in progress."""
    begun = site.low_rank.restarting
    return site.restart if begun is None else begun - 1


def _idle(norms: dict[str, float], hidden: bool) -> tuple[str, ...]:
    """Return the idle sites, with a warning, if anything else has been trained."""
    idle = tuple(name for name, norm in norms.items() if norm == 0)
    if not idle or (len(idle) == len(norms) and not hidden):
        return ()
    shown = ", ".join(idle[:4]) + (", ..." if len(idle) > 4 else "")
    warnings.warn(
        f"B is still zero at {len(idle)} of {len(norms)} low-rank sites ({shown}), so nothing has "
        "trained them since they were made or redrawn: either their modules did not run, or their "
        "weight is hidden from autograd (read by a torch.autograd.Function, under torch.no_grad, "
        "or through .detach())",
        stacklevel=3,
    )
    return idle


def _refuse_sites(model: nn.Module, sites: list[tuple[str, Site]]) -> None:
    """Raise ValueError if a W is trained or has no memory, or if a W or a factor is tied."""
    for name, site in sites:
        if site.weight.requires_grad:
            raise ValueError(
                f"W of {name} requires a gradient, and would be trained at full rank beside its "
                "factors: freeze it by "
                f"parametrizations.{site.tensor_name}.original.requires_grad_(False)"
            )
        if site.weight.is_meta or site.lora_A.is_meta or site.lora_B.is_meta:
            raise ValueError(
                f"{name} has no memory (a meta tensor, or offloaded by hooks): a merge would be "
                "lost. Bring it to a device first; a tensor offloaded by hooks cannot be trained"
            )
    refuse_ties({f"{name}.{site.tensor_name}": site.owner for name, site in sites})
    owners = Owners(owned_by(model.modules()))
    for name, site in sites:
        for which, factor in site.low_rank.named_parameters():
            if len(owners.of(factor)) > 1:
                raise ValueError(
                    f"{which} of {name} is tied to another tensor of the model, which a redraw of "
                    "one site would change: give each site factors of its own"
                )


@torch.no_grad()
def _refuse_gradients(sites: list[tuple[str, Site]]) -> None:
    """Raise ValueError if a factor has a gradient that no step has used yet."""
    unreduced = unreduced_gradients(site.low_rank for _, site in sites)
    own = [_largest_gradient(site, id(site.low_rank) in unreduced) for _, site in sites]
    largest = _over_shards(sites, own, shard_max, lambda site: site.lora_B)
    waiting = [name for (name, _), size in zip(sites, largest, strict=True) if size != 0]
    if waiting:
        raise ValueError(
            f"the factors of {len(waiting)} sites (first: {waiting[0]}) have gradients that no "
            "step has used, and a restart replaces these factors: restart between a step and the "
            "next backward, once per optimizer step and not per micro-batch, or drop the "
            "gradients by zero_grad()"
        )


def _largest_gradient(site: Site, unreduced: bool) -> Tensor:
    """Return the largest magnitude in gradients that no step has used; infinite if unknown."""
    grads = [grad for grad in _gradients(site) if not was_stepped(grad)]
    grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    sizes = [largest_magnitude(local(grad)).nan_to_num(torch.inf) for grad in grads]
    least = torch.inf if unreduced else 0.0
    return torch.stack([local(site.lora_B).new_full((), least, dtype=torch.float32), *sizes]).max()


def _gradients(site: Site) -> list[Tensor]:
    """Return the gradients of A, B and a trained scale, if there are any."""
    of_factors = (site.lora_A, site.lora_B, site.low_rank.lora_scale)
    return [p.grad for p in of_factors if p is not None and p.grad is not None]


@torch.no_grad()
def update_norms(sites: list[tuple[str, Site]], updates: list[Delta]) -> dict[str, float]:
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
    like: Callable[[Site], Tensor] = lambda site: site.weight,
) -> list[float]:
    """Return one scalar per site, reduced over the processes that `like(site)` is split over."""
    together: dict[object, list[int]] = {}
    for index, (_, site) in enumerate(sites):
        place = (sharding(like(site)), values[index].device, values[index].dtype)
        together.setdefault(place, []).append(index)
    found: dict[int, Tensor] = {}
    for members in together.values():
        own = torch.stack([values[index] for index in members])
        found |= dict(zip(members, reduced(own, like(sites[members[0]][1])), strict=True))
    return to_floats([found[index] for index in range(len(sites))])


def _call(sites: list[tuple[str, Site]], numbers: dict[str, int], reset: Reset) -> str:
    keys = [
        (name, site.rank, site.low_rank.seed, numbers[name], site.restart) for name, site in sites
    ]
    which = blake2b(str(keys).encode(), digest_size=4).hexdigest()
    number = numbers[sites[0][0]] + 1
    return f"restart_ number {number} of {len(sites)} sites ({which}) by {reset}"


def refuse_overflow(sites: list[tuple[str, Site]], norms: dict[str, float]) -> None:
    """Raise ValueError if a merge of updates of these norms would not be finite."""
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        raise ValueError(
            f"the update of {len(broken)} sites is not finite (first: {broken[0]}): go back to an "
            "earlier checkpoint, and skip steps whose gradients are not finite"
        )
    # No entry of s B A exceeds its norm. Only fp16 has so little range that it matters.
    half = [(name, site) for name, site in sites if site.weight.dtype == torch.float16]
    own = [largest_magnitude(local(site.weight.detach())) for _, site in half]
    for (name, _), entry in zip(half, _over_shards(half, own, shard_max), strict=True):
        if entry + norms[name] > torch.finfo(torch.float16).max:
            raise ValueError(
                f"{name}: a merge of an update of norm {norms[name]:g} into a float16 weight may "
                "overflow: store W in float32 or bfloat16"
            )


def largest_magnitude(part: Tensor) -> Tensor:
    """Return the largest magnitude in a process's part; 0 if the part is empty."""
    return part.abs().max().float() if part.numel() else part.new_zeros((), dtype=torch.float32)

"""The reset of some parameters' moments, in any optimizer."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from relora_core.distributed.local import local
from relora_core.optim.moments import Moment, Optimizers, ParameterState, find_states
from relora_core.optim.pruning import check_ratio, has_nan, magnitude_masks, random_mask
from relora_core.optim.radix_select import drop_count

Masks = Literal["joint", "independent"]
Rule = Literal["magnitude", "random"]


@dataclass(frozen=True)
class Reset:
    """The options of a reset.

    Args:
        prune_ratio: from 0 to 1, the fraction to zero; 1 zeroes all.
        masks: "joint", one mask for all moments of a parameter, or "independent", one for each.
        rule: "magnitude" zeroes the smallest entries, "random" a random choice.
        reset_step: whether the parameters' step counts start again.

    Raises:
        ValueError: if a value is none of these.
    """

    prune_ratio: float = 0.99
    masks: Masks = "joint"
    rule: Rule = "magnitude"
    reset_step: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.prune_ratio, "prune_ratio")
        if self.masks not in ("joint", "independent"):
            raise ValueError(f"masks must be 'joint' or 'independent'; got {self.masks!r}")
        if self.rule not in ("magnitude", "random"):
            raise ValueError(f"rule must be 'magnitude' or 'random'; got {self.rule!r}")


@dataclass(frozen=True)
class ResetReport:
    """What a reset did.

    Args:
        entries: the number of entries in all moments that the reset considered. Sharded moments
            count with all their shards; moments that ZeroRedundancyOptimizer keeps on another
            process do not count.
        zeroed: exactly how many of these entries the masks zeroed.
    """

    entries: int
    zeroed: int

    @property
    def zeroed_fraction(self) -> float:
        """`zeroed / entries`; 0 if there was no state yet."""
        return self.zeroed / self.entries if self.entries else 0.0


def reset_optimizer_(
    optimizer: Optimizers,
    params: Iterable[nn.Parameter],
    *,
    prune_ratio: float = 0.99,
    masks: Masks = "joint",
    rule: Rule = "magnitude",
    reset_step: bool = False,
    seed: int = 0,
) -> ResetReport:
    r"""Prune the optimizer's moments of `params`.

    A joint mask zeroes the same entries in all moments of a parameter: those where the leading
    moment (for Adam $m$ = `exp_avg`) is smallest. The authors' code instead prunes each moment
    separately ("independent"), which leaves entries with $m \ne 0$ and $v = 0$. While $B = 0$, the
    gradient of $A$ is zero, so a step moves such an entry of $A$ by `lr * m / eps`.

    Hyperparameters and the states of all other parameters do not change, nor do step counts unless
    `reset_step` is true. 8-bit moments are zeroed through their codes, and all other values keep
    their bits. Copies of a parameter that later steps start from, such as schedule-free's `z`, are
    set to the parameter.

    Args:
        optimizer: any torch optimizer whose moments are known (see `declare_moments`), or a
            wrapper around one; or a list, tuple or dict of several.
        params: the parameters whose moments to prune; all are the optimizer's.
        prune_ratio: the fraction of each moment's entries to zero, from 0 to 1, counted as in
            `magnitude_prune_`; 1 zeroes all.
        masks: "joint", one mask for all moments of a parameter, or "independent", one for each.
        rule: "magnitude" zeroes the smallest entries, "random" a random choice (`random_prune_`).
        reset_step: whether to start the parameters' step counts again, so that Adam corrects the
            bias of the new moments as at the start of training. The authors' code never does this.
        seed: the seed of the random rule, which is also keyed by each parameter's index in
            `params`.

    Returns:
        A `ResetReport`.

    Raises:
        ValueError: if an argument is out of range, a parameter is not the optimizer's, its state
            has undeclared keys, or a moment holds NaN; if `prune_ratio` is below 1 and the
            optimizer keeps only factored statistics, or 4-bit codes without a zero; if `reset_step`
            is true and the optimizer counts no steps per parameter. Nothing is changed then.
        TypeError: if a moment is neither floating point nor in a known code.

    Examples:
        >>> p = nn.Parameter(torch.ones(100))
        >>> optimizer = torch.optim.AdamW([p])
        >>> p.grad = torch.arange(100.0)
        >>> optimizer.step()
        >>> reset_optimizer_(optimizer, [p], prune_ratio=0.9)
        ResetReport(entries=200, zeroed=180)

    Reference: https://arxiv.org/abs/2307.05695, section 3: 99% by magnitude.
    """
    reset = Reset(prune_ratio, masks, rule, reset_step)
    params = list(params)
    states = plan_reset(optimizer, params, reset)
    refuse_nan(states)
    return apply_reset_(states, reset, [f"{seed}/{index}" for index in range(len(params))])


def plan_reset(
    optimizer: Optimizers, params: Iterable[nn.Parameter], reset: Reset
) -> list[ParameterState]:
    """Return the states that a reset will change, or raise what `reset_optimizer_` raises.

    It reads no values and does not communicate, so it does not look for NaN; `refuse_nan` does.
    """
    states = find_states(optimizer, params)
    for state in states:
        if state.shared and not state.moments and reset.prune_ratio < 1:
            raise ValueError(
                "the optimizer keeps factored statistics, which many entries of a parameter share, "
                f"so they cannot be pruned; got prune_ratio={reset.prune_ratio:g}: give 1, which "
                "zeroes them"
            )
        if not all(moment.has_zero for moment in state.moments) and reset.prune_ratio < 1:
            raise ValueError(
                "the optimizer's 4-bit second moment has no code for zero, so it cannot be pruned; "
                f"got prune_ratio={reset.prune_ratio:g}: give 1, which zeroes it through its "
                "scales, or use 8 bits"
            )
        if reset.reset_step and not state.clock:
            raise ValueError(
                "the optimizer counts no steps for each parameter, so there is none to reset: "
                "leave reset_step out"
            )
    return states


def refuse_nan(states: Sequence[ParameterState]) -> None:
    """Raise ValueError if a moment holds NaN, on any of the processes that it is split over."""
    moments = (moment.values() for state in states for moment in state.moments)
    shared = (statistic for state in states for statistic in state.shared)
    if has_nan(itertools.chain(moments, shared)):
        raise ValueError(
            "the optimizer's moments hold NaN, which has no magnitude: go back to an earlier "
            "checkpoint, and skip steps whose gradients are not finite"
        )


@torch.no_grad()
def apply_reset_(
    states: Sequence[ParameterState], reset: Reset, keys: Sequence[str]
) -> ResetReport:
    """Prune what `plan_reset` returned; `keys` key the random masks, one for each parameter."""
    entries = zeroed = 0
    moments = [moment for state in states for moment in state.moments]
    for moment, mask in zip(moments, _masks(states, reset, keys), strict=True):
        moment.zero_where_(mask)
        entries += moment.tensor.numel()
        zeroed += drop_count(moment.tensor.numel(), reset.prune_ratio)
    for state in states:
        for statistic in state.shared:
            entries += statistic.numel()
            if reset.prune_ratio == 1:
                statistic.zero_()
                zeroed += statistic.numel()
        for copy in state.copies:
            local(copy).copy_(local(state.parameter.detach()))
        if reset.reset_step:
            _restart_clock_(state)
    return ResetReport(entries, zeroed)


def _masks(states: Sequence[ParameterState], reset: Reset, keys: Sequence[str]) -> Iterator[Tensor]:
    """Yield the mask of every moment, in order."""
    joint = reset.masks == "joint"
    chosen_by = [state.moments[:1] if joint else state.moments for state in states]
    masks = iter(_masks_by(states, chosen_by, reset, keys))
    for state, group in zip(states, chosen_by, strict=True):
        own = list(itertools.islice(masks, len(group)))
        yield from own * len(state.moments) if joint else own


def _masks_by(
    states: Sequence[ParameterState],
    chosen_by: Sequence[Sequence[Moment]],
    reset: Reset,
    keys: Sequence[str],
) -> Iterable[Tensor]:
    """Return the masks that the moments of each group choose, in order."""
    if reset.rule == "magnitude":
        values = (moment.values() for group in chosen_by for moment in group)
        return magnitude_masks(values, reset.prune_ratio)
    return (
        random_mask(moment.tensor, reset.prune_ratio, f"{keys[state.index]}/{number}")
        for state, group in zip(states, chosen_by, strict=True)
        for number, moment in enumerate(group)
    )


def _restart_clock_(state: ParameterState) -> None:
    for key, begin in state.clock.items():
        count = state.state.get(key)
        if isinstance(count, Tensor):
            count.fill_(begin)
        elif count is not None:
            state.state[key] = type(count)(begin)

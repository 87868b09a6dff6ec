"""Reset the moments of some parameters, in any optimizer; and a wrapper that has it as a method."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.moments import ParameterState, find_states
from relora_core.pruning import (
    check_prunable,
    check_ratio,
    has_nan,
    magnitude_masks,
    random_mask,
    zero_where_,
)
from relora_core.selection import drop_count

Masks = Literal["joint", "independent"]
Rule = Literal["magnitude", "random"]


@dataclass(frozen=True)
class Reset:
    """How moments are reset.

    Args:
        prune_ratio: from 0 to 1, the fraction to zero; 1 zeroes all.
        masks: "joint", one for a parameter's moments, or "independent", one for each.
        rule: "magnitude", the smallest go, or "random".
        reset_step: whether the parameters' step counts begin anew.

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
        entries: entries of all moments looked at; sharded ones count whole, those that
            ZeroRedundancyOptimizer keeps on another rank not at all.
        zeroed: how many of them the masks zeroed, exactly.
    """

    entries: int
    zeroed: int

    @property
    def zeroed_fraction(self) -> float:
        """`zeroed / entries`, 0 where there was no state yet."""
        return self.zeroed / self.entries if self.entries else 0.0


def reset_optimizer_(
    optimizer: Optimizer,
    params: Iterable[nn.Parameter],
    *,
    prune_ratio: float = 0.99,
    masks: Masks = "joint",
    rule: Rule = "magnitude",
    reset_step: bool = False,
    seed: int = 0,
) -> ResetReport:
    r"""Prune the optimizer's moments of `params`.

    With one joint mask a parameter's moments are zeroed together, where the leading one (for
    Adam $m$ = `exp_avg`) is smallest. This differs from the authors' code, which prunes each by
    itself ("independent"): that leaves $m \ne 0$ over $v = 0$, and while $B = 0$ keeps $A$'s
    gradient at zero, $A$ then moves by `lr * m / eps` in a step. Hyperparameters, all other
    parameters' states and, unless asked for, step counts stay as they are.

    Args:
        optimizer: any torch optimizer whose moments are known (see `declare_moments`), or a
            wrapper around one.
        params: some of its parameters.
        prune_ratio: from 0 to 1, the fraction to zero as in `magnitude_prune_`; 1 zeroes all.
        masks: "joint" or "independent".
        rule: "magnitude", or "random" as in `random_prune_`.
        reset_step: whether to begin the parameters' step counts anew, so that Adam corrects the
            bias of its new moments as it did at first. The authors' code never does.
        seed: of the random rule, which is also keyed by the parameter's place in `params`.

    Returns:
        A `ResetReport`.

    Raises:
        ValueError: if an argument is out of range, a parameter is not the optimizer's, its state
            has undeclared keys, or a moment holds NaN; if the optimizer keeps factored statistics
            only and `prune_ratio` is not 1; if it counts no steps for each parameter and
            `reset_step` is asked for. Nothing is changed then.
        TypeError: if a moment is not floating point.

    Example:
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
    return apply_reset_(states, reset, [f"{seed}/{index}" for index in range(len(params))])


def plan_reset(
    optimizer: Optimizer, params: Iterable[nn.Parameter], reset: Reset
) -> list[ParameterState]:
    """Return the states that a reset will change, or raise what `reset_optimizer_` raises."""
    states = find_states(optimizer, params)
    for state in states:
        for moment in state.moments:
            check_prunable(moment)
        if state.factors and not state.moments and reset.prune_ratio < 1:
            raise ValueError(
                "the optimizer keeps factored statistics, which no entry of a parameter owns, so "
                f"they cannot be pruned; got prune_ratio={reset.prune_ratio:g}: give 1, which "
                "zeroes them"
            )
        if reset.reset_step and not state.clock:
            raise ValueError(
                "the optimizer counts no steps for each parameter, so there is none to reset: "
                "leave reset_step out"
            )
    tensors = [tensor for state in states for tensor in (*state.moments, *state.factors)]
    if has_nan(tensors):
        raise ValueError(
            "the optimizer's moments hold NaN, which has no magnitude: go back to a checkpoint "
            "from before, and skip steps whose gradients are not finite"
        )
    return states


@torch.no_grad()
def apply_reset_(
    states: Sequence[ParameterState], reset: Reset, keys: Sequence[str]
) -> ResetReport:
    """Prune what `plan_reset` returned; `keys` of random masks are by the parameters' places."""
    entries = zeroed = 0
    moments = [moment for state in states for moment in state.moments]
    for moment, mask in zip(moments, _masks(states, reset, keys), strict=True):
        zero_where_(moment, mask)
        entries += moment.numel()
        zeroed += drop_count(moment.numel(), reset.prune_ratio)
    for state in states:
        for factor in state.factors:
            entries += factor.numel()
            if reset.prune_ratio == 1:
                factor.zero_()
                zeroed += factor.numel()
        if reset.reset_step:
            _restart_clock_(state)
    return ResetReport(entries, zeroed)


def _masks(states: Sequence[ParameterState], reset: Reset, keys: Sequence[str]) -> Iterator[Tensor]:
    """Yield the mask of every moment, in order."""
    ratio, joint = reset.prune_ratio, reset.masks == "joint"
    chosen_by = [state.moments[:1] if joint else state.moments for state in states]
    if reset.rule == "magnitude":
        masks = iter(magnitude_masks([m for group in chosen_by for m in group], ratio))
    else:
        masks = (
            random_mask(moment, ratio, f"{keys[state.index]}/{number}")
            for state, group in zip(states, chosen_by, strict=True)
            for number, moment in enumerate(group)
        )
    for state, group in zip(states, chosen_by, strict=True):
        own = list(itertools.islice(masks, len(group)))
        yield from own * len(state.moments) if joint else own


def _restart_clock_(state: ParameterState) -> None:
    for key, begin in state.clock.items():
        count = state.state.get(key)
        if isinstance(count, Tensor):
            count.fill_(begin)
        elif count is not None:
            state.state[key] = type(count)(begin)


def _delegated(name: str) -> Any:
    """Return a property that reads, writes and deletes the inner optimizer's attribute."""

    def read(self: "ResettableOptimizer") -> Any:
        return getattr(self.inner, name)

    def write(self: "ResettableOptimizer", value: Any) -> None:
        setattr(self.inner, name, value)

    def delete(self: "ResettableOptimizer") -> None:
        delattr(self.inner, name)

    return property(read, write, delete)


class ResettableOptimizer(Optimizer):
    """Any torch optimizer, with `reset_` as a method.

    It keeps nothing of its own and copies nothing: state, groups, defaults and hooks are the inner
    optimizer's, looked up at each use, so schedulers, GradScaler, distributed checkpoints and
    `load_state_dict` work on either. It counts no steps: a checkpoint library may call `step` to
    make state, and a GradScaler calls it for updates that are skipped.

    Args:
        inner: the optimizer.

    Raises:
        TypeError: if `inner` is not a `torch.optim.Optimizer`.

    Example:
        >>> p = nn.Parameter(torch.zeros(3))
        >>> optimizer = ResettableOptimizer(torch.optim.AdamW([p], lr=0.1))
        >>> p.grad = torch.ones(3)
        >>> optimizer.step()
        >>> optimizer.reset_([p], prune_ratio=1.0).zeroed_fraction
        1.0
    """

    state = _delegated("state")
    param_groups = _delegated("param_groups")
    defaults = _delegated("defaults")
    # A GradScaler sets the first two on the optimizer it is given, and a fused step reads them.
    grad_scale = _delegated("grad_scale")
    found_inf = _delegated("found_inf")
    _step_supports_amp_scaling = _delegated("_step_supports_amp_scaling")
    _optimizer_step_pre_hooks = _delegated("_optimizer_step_pre_hooks")
    _optimizer_step_post_hooks = _delegated("_optimizer_step_post_hooks")
    _optimizer_state_dict_pre_hooks = _delegated("_optimizer_state_dict_pre_hooks")
    _optimizer_state_dict_post_hooks = _delegated("_optimizer_state_dict_post_hooks")
    _optimizer_load_state_dict_pre_hooks = _delegated("_optimizer_load_state_dict_pre_hooks")
    _optimizer_load_state_dict_post_hooks = _delegated("_optimizer_load_state_dict_post_hooks")

    def __init__(self, inner: Optimizer) -> None:
        # Optimizer.__init__ would make a second state and second groups.
        if not isinstance(inner, Optimizer):
            raise TypeError(f"inner must be a torch.optim.Optimizer; got {type(inner).__name__}")
        self.inner = inner

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step the inner optimizer."""
        return self.inner.step(closure)

    # The inner step runs the hooks; torch would wrap this one to run them a second time.
    step.hooked = True  # type: ignore[attr-defined]

    def reset_(
        self,
        params: Iterable[nn.Parameter],
        *,
        prune_ratio: float = 0.99,
        masks: Masks = "joint",
        rule: Rule = "magnitude",
        reset_step: bool = False,
        seed: int = 0,
    ) -> ResetReport:
        """Prune the moments of `params`: see `reset_optimizer_`."""
        return reset_optimizer_(
            self.inner,
            params,
            prune_ratio=prune_ratio,
            masks=masks,
            rule=rule,
            reset_step=reset_step,
            seed=seed,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the inner optimizer's parameters."""
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state dict."""
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.inner.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # What the inner one has beyond torch's interface. Looking for `inner` itself, or for a
        # protocol, before it is set must not come back here.
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"ResettableOptimizer({self.inner!r})"

"""Reset the moments of some parameters, in any optimizer; and a wrapper that has it as a method."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.moments import find_moments
from relora_core.pruning import check_prunable, check_ratio, has_nan, prune_mask, zero_where_
from relora_core.selection import drop_count

Masks = Literal["joint", "independent"]


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
) -> ResetReport:
    r"""Prune the optimizer's moments of `params` by magnitude.

    With one joint mask a parameter's moments are zeroed together, where the leading one (for
    Adam $m$ = `exp_avg`) is smallest. This differs from the authors' code, which prunes each by
    itself ("independent"): that leaves $m \ne 0$ over $v = 0$, and while $B = 0$ keeps $A$'s
    gradient at zero, $A$ then moves by `lr * m / eps` in a step. Step counters, hyperparameters
    and all other parameters' states stay as they are.

    Args:
        optimizer: any torch optimizer whose moments are known (see `declare_moments`), or a
            wrapper around one.
        params: some of its parameters.
        prune_ratio: from 0 to 1, the fraction to zero as in `magnitude_prune_`; 1 zeroes all.
        masks: "joint" or "independent".

    Returns:
        A `ResetReport`.

    Raises:
        ValueError: if an argument is out of range, a parameter is not the optimizer's, its state
            has undeclared keys, or a moment holds NaN. Nothing is changed then.
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
    moments = plan_reset(optimizer, params, prune_ratio=prune_ratio, masks=masks)
    return apply_reset_(moments, prune_ratio=prune_ratio, masks=masks)


def plan_reset(
    optimizer: Optimizer, params: Iterable[nn.Parameter], *, prune_ratio: float, masks: Masks
) -> list[list[Tensor]]:
    """Return the moments that a reset will prune, or raise what `reset_optimizer_` raises."""
    check_ratio(prune_ratio, "prune_ratio")
    if masks not in ("joint", "independent"):
        raise ValueError(f"masks must be 'joint' or 'independent'; got {masks!r}")
    found = find_moments(optimizer, params)
    for moment in (moment for moments in found for moment in moments):
        check_prunable(moment)
    if has_nan([moment for moments in found for moment in moments]):
        raise ValueError(
            "the optimizer's moments hold NaN, which has no magnitude: go back to a checkpoint "
            "from before, and skip steps whose gradients are not finite"
        )
    return found


@torch.no_grad()
def apply_reset_(found: list[list[Tensor]], *, prune_ratio: float, masks: Masks) -> ResetReport:
    """Prune what `plan_reset` returned."""
    entries = zeroed = 0
    for moments in found:
        mask = prune_mask(moments[0], prune_ratio)
        for moment in moments:
            if masks == "independent" and moment is not moments[0]:
                mask = prune_mask(moment, prune_ratio)
            zero_where_(moment, mask)
            entries += moment.numel()
            zeroed += drop_count(moment.numel(), prune_ratio)
    return ResetReport(entries, zeroed)


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
    ) -> ResetReport:
        """Prune the moments of `params`: see `reset_optimizer_`."""
        return reset_optimizer_(self.inner, params, prune_ratio=prune_ratio, masks=masks)

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

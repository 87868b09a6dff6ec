"""A wrapper that gives any optimizer the reset as a method."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from relora_core.optim.reset import Masks, ResetReport, Rule, reset_optimizer_


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

    The wrapper has no state of its own. State, groups, defaults and hooks are the inner
    optimizer's, looked up at each use, so schedulers, GradScaler, distributed checkpoints and
    `load_state_dict` work on the wrapper as on the inner optimizer. It counts no steps, because
    not every call of `step` is one: a checkpoint library may call `step` to create state, and a
    GradScaler calls it for updates that are skipped.

    Args:
        inner: the optimizer to wrap.

    Raises:
        TypeError: if `inner` is not a `torch.optim.Optimizer`.

    Examples:
        >>> import torch
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

    # The inner step runs the hooks; without this mark, torch would run them a second time here.
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
        # Attributes of the inner optimizer beyond torch's interface. Before `inner` is set, a
        # lookup of `inner` itself or of a dunder name must not recurse into this method.
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"ResettableOptimizer({self.inner!r})"

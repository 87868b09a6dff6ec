"""Assertions that a restart leaves nothing that was computed from the old factors."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core._torch_private import DispatchMode, leaves, writes
from relora_core.restart import RestartReport, restart_
from relora_core.sites.site import Site, low_rank_sites
from relora_core.sites.targets import add_low_rank_
from relora_core.testing.subjects import PropertyError
from relora_core.testing.twin import same_state, state_of

Restart = Callable[[nn.Module, Optimizer, float], object]


def restart_by_relora(model: nn.Module, optimizer: Optimizer, ratio: float) -> RestartReport:
    """Restart with this library: call `restart_` with `prune_ratio=ratio`."""
    return restart_(model, optimizer, prune_ratio=ratio)


def assert_no_old_gradient_is_used(restart: Restart, *, seed: int = 0) -> None:
    """Assert that a restart refuses gradients of the old factors, or clears them.

    Args:
        restart: function of (model, optimizer, ratio).
        seed: seed of the weights and the data.

    Raises:
        PropertyError: if the next step would use such a gradient.

    Examples:
        >>> from relora_core import restart_
        >>> assert_no_old_gradient_is_used(lambda m, o, ratio: restart_(m, o, prune_ratio=ratio))
    """
    model, optimizer = _trained(seed)
    _backward(model, seed)
    before = _copied(model, optimizer)
    if _refused(restart, model, optimizer):
        same_state(_copied(model, optimizer), before, "a restart that refused gradients changed")
        return
    for name, site in low_rank_sites(model):
        for which, p in (("lora_A", site.lora_A), ("lora_B", site.lora_B)):
            if p.grad is not None and p.grad.any():
                raise PropertyError(f"{which} of {name!r} still has the gradient of the old factor")


def assert_frozen_moments_are_reset(restart: Restart, *, seed: int = 0) -> None:
    """Assert that a restart also resets the moments of a factor that is currently frozen.

    Args:
        restart: function of (model, optimizer, ratio).
        seed: seed of the weights and the data.

    Raises:
        PropertyError: if a full reset leaves some of these moments.

    Examples:
        >>> from relora_core import restart_
        >>> assert_frozen_moments_are_reset(lambda m, o, ratio: restart_(m, o, prune_ratio=ratio))
    """
    model, optimizer = _trained(seed)
    frozen = _sites(model)[0].lora_A.requires_grad_(False)
    restart(model, optimizer, 1.0)
    if optimizer.state[frozen]["exp_avg"].any():
        raise PropertyError("a frozen A was redrawn, but the moments of the old A were kept")


def assert_second_owners_are_safe(restart: Restart, *, seed: int = 0) -> None:
    """Assert that a restart keeps the values of a module that shares W, or refuses to run.

    Args:
        restart: function of (model, optimizer, ratio).
        seed: seed of the weights and the data.

    Raises:
        PropertyError: if a merge has changed the module's values.

    Examples:
        >>> from relora_core import restart_
        >>> assert_second_owners_are_safe(lambda m, o, ratio: restart_(m, o, prune_ratio=ratio))
    """
    model, optimizer = _trained(seed)
    owner = nn.Module()
    owner.W = nn.Parameter(_sites(model)[0].weight.detach(), requires_grad=False)
    whole = nn.ModuleList([model, owner])
    kept = owner.W.clone()
    before = _copied(whole, optimizer)
    if _refused(restart, whole, optimizer):
        same_state(_copied(whole, optimizer), before, "a restart that refused a tie changed")
    elif not torch.equal(owner.W, kept):
        raise PropertyError("a merge has changed a module that shares W with a site")


def assert_several_optimizers_are_reset(restart: Restart, *, seed: int = 0) -> None:
    """Assert that a restart resets both optimizers in a list of two, or refuses to run.

    Args:
        restart: function of (model, optimizer, ratio).
        seed: seed of the weights and the data.

    Raises:
        PropertyError: if an optimizer keeps its moments, or a refused restart changes anything.

    Examples:
        >>> from relora_core import restart_
        >>> mine = lambda model, optimizer, ratio: restart_(model, optimizer, prune_ratio=ratio)
        >>> assert_several_optimizers_are_reset(mine)
    """
    model = _model(seed)
    factors = [[site.lora_A for site in _sites(model)], [site.lora_B for site in _sites(model)]]
    several: Any = [torch.optim.AdamW(params, lr=0.1) for params in factors]
    for number in range(2):
        _backward(model, seed + number)
        for one in several:
            one.step()
        model.zero_grad()
    before = [_copied(model, one) for one in several]
    if _refused(restart, model, several):
        for kept, one in zip(before, several, strict=True):
            same_state(_copied(model, one), kept, "a restart that refused two optimizers changed")
        return
    for one, params in zip(several, factors, strict=True):
        if any(one.state[p]["exp_avg"].any() for p in params):
            raise PropertyError("one of two optimizers has kept its moments")


def assert_broken_off_is_found(restart: Restart, *, seed: int = 0) -> None:
    """Assert that the next call finishes an interrupted restart, or refuses it.

    The restart is interrupted before each operation that writes to a tensor. After the next call,
    the model must compute the same function as before the restart, or that call must raise.

    Args:
        restart: function of (model, optimizer, ratio).
        seed: seed of the weights and the data.

    Raises:
        PropertyError: if the next call succeeds and the model computes another function.

    Examples:
        >>> from relora_core import restart_
        >>> assert_broken_off_is_found(lambda m, o, ratio: restart_(m, o, prune_ratio=ratio))
    """
    model, optimizer = _trained(seed)
    x = _inputs(seed)
    expected = model(x).detach()
    operation = 0
    while True:
        one, its = copy.deepcopy((model, optimizer))
        with _BreakOff(operation) as breaks:
            _refused(restart, one, its)
        if not breaks.broke:
            return
        if not _refused(restart, one, its) and (one(x) - expected).abs().max() > 1e-8:
            raise PropertyError(
                f"a restart interrupted at operation {operation} changed the function, and the "
                "next call did not refuse it"
            )
        operation += 1


# Torch has no types for the mode.
class _BreakOff(DispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """A mode that raises an out-of-memory error at one of the operations that write."""

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor for `__init__`
        self.at, self.count, self.broke = at, 0, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += writes(func)
        if writes(func) and self.count == self.at + 1:
            self.broke = True
            raise torch.OutOfMemoryError(f"planted at operation {self.at}")
        return func(*args, **(kwargs or {}))


def _model(seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    add_low_rank_(model, "*", rank=2, seed=seed)
    return model


def _trained(seed: int) -> tuple[nn.Sequential, Optimizer]:
    model = _model(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number in range(2):
        _backward(model, seed + number)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def _backward(model: nn.Module, seed: int) -> None:
    model(_inputs(seed)).square().sum().backward()


def _sites(model: nn.Module) -> list[Site]:
    return [site for _, site in low_rank_sites(model)]


def _refused(restart: Restart, model: nn.Module, optimizer: Any) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            restart(model, optimizer, 1.0)
    except (ValueError, TypeError, torch.OutOfMemoryError):
        return True
    return False


def _copied(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    values = leaves(copy.deepcopy(optimizer.state_dict()))
    return state_of(model) | {f"the optimizer's {number}": x for number, x in enumerate(values)}

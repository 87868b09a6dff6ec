"""The properties of a restart about all that was made of the old factors, an assertion each."""

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
    """Restart by this library: `restart_` with `prune_ratio=ratio`."""
    return restart_(model, optimizer, prune_ratio=ratio)


def assert_no_old_gradient_is_used(restart: Restart, *, seed: int = 0) -> None:
    """Assert that a gradient of the old factors is refused, or gone after the restart.

    Args:
        restart: of (model, optimizer, ratio).
        seed: of the weights and of the data.

    Raises:
        PropertyError: if the next step would use it.

    Examples:
        >>> from relora_core import restart_
        >>> assert_no_old_gradient_is_used(lambda m, o, ratio: restart_(m, o, prune_ratio=ratio))
    """
    model, optimizer = _trained(seed)
    _backward(model, seed)
    before = _copied(model, optimizer)
    if _refused(restart, model, optimizer):
        same_state(
            _copied(model, optimizer), before, "a restart that refuses gradients has changed"
        )
        return
    for name, site in low_rank_sites(model):
        for which, p in (("lora_A", site.lora_A), ("lora_B", site.lora_B)):
            if p.grad is not None and p.grad.any():
                raise PropertyError(
                    f"{which} of {name!r} still has a gradient of the factor that it was"
                )


def assert_frozen_moments_are_reset(restart: Restart, *, seed: int = 0) -> None:
    """Assert that the moments of a factor that is frozen for now are reset with it.

    Args:
        restart: of (model, optimizer, ratio).
        seed: of the weights and of the data.

    Raises:
        PropertyError: if a full reset leaves some.

    Examples:
        >>> from relora_core import restart_
        >>> assert_frozen_moments_are_reset(lambda m, o, ratio: restart_(m, o, prune_ratio=ratio))
    """
    model, optimizer = _trained(seed)
    frozen = _sites(model)[0].lora_A.requires_grad_(False)
    restart(model, optimizer, 1.0)
    if optimizer.state[frozen]["exp_avg"].any():
        raise PropertyError("a frozen A was redrawn, and the moments of the old one are kept")


def assert_second_owners_are_safe(restart: Restart, *, seed: int = 0) -> None:
    """Assert that a module that shares W keeps what it computes, or that the restart refuses.

    Args:
        restart: of (model, optimizer, ratio).
        seed: of the weights and of the data.

    Raises:
        PropertyError: if a merge has changed it.

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
        same_state(_copied(whole, optimizer), before, "a restart that refuses a tie has changed")
    elif not torch.equal(owner.W, kept):
        raise PropertyError("a merge has changed a module that shares W with a site")


def assert_several_optimizers_are_reset(restart: Restart, *, seed: int = 0) -> None:
    """Assert that of two optimizers, in a list, both are reset; or that the restart refuses.

    Args:
        restart: of (model, optimizer, ratio).
        seed: of the weights and of the data.

    Raises:
        PropertyError: if one has kept its moments, or a refusal has changed something.

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
            same_state(
                _copied(model, one), kept, "a restart that refuses two optimizers has changed"
            )
        return
    for one, params in zip(several, factors, strict=True):
        if any(one.state[p]["exp_avg"].any() for p in params):
            raise PropertyError("of two optimizers one has kept its moments")


def assert_broken_off_is_found(restart: Restart, *, seed: int = 0) -> None:
    """Assert that a restart that is broken off is finished by the next call, or refused by it.

    Wherever it is, the function must be the one before, or the next call must raise. It is broken
    off before each operation that writes: between two of those, every tensor is the same.

    Args:
        restart: of (model, optimizer, ratio).
        seed: of the weights and of the data.

    Raises:
        PropertyError: if the next call goes on from another function.

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
                f"broken off at operation {operation}, a restart has changed the function, and the "
                "next one goes on from there"
            )
        operation += 1


# Torch has no types for it.
class _BreakOff(DispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Runs out of memory at one operation of those that write."""

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor for this
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

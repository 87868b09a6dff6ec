"""Assertions of the properties of a merge, and of the function of a module with sites."""

import copy
import math

import torch
from torch import Tensor, nn

from relora_core.sites.site import Site
from relora_core.testing.inputs import fitting
from relora_core.testing.subjects import (
    LowRankSite,
    PropertyError,
    Sites,
    exact_update,
    exact_weight,
    fill_B_,
    find_sites,
    scale_of,
    trained_scale,
    wide_copy,
)
from relora_core.testing.twin import (
    DenseTwin,
    close,
    gradients_of,
    only_sites_change,
    same_outputs,
    same_state,
    state_of,
)


def assert_is_dense(model: nn.Module, *inputs: Tensor, sites: Sites = find_sites) -> None:
    r"""Assert that the module computes with $W + s B A$ and nothing else.

    Args:
        model: module with low-rank sites; a float64 copy of it is checked.
        inputs: inputs of one call of the model.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if an output differs from the dense twin's.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_is_dense(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    wide = wide_copy(model)
    x = fitting(inputs, wide)
    same_outputs(wide, DenseTwin(wide, sites), x, "the output differs from that of W + s B A")


def assert_gradients_are_dense(
    model: nn.Module, *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that all gradients equal those of the dense twin, and that W has none.

    The gradients are of a random linear function of the outputs, with respect to A, B, all other
    trained Parameters, and the inputs.

    Args:
        model: module with low-rank sites.
        inputs: inputs of one call of the model.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if a gradient differs, or W is trained.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_gradients_are_dense(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    wide = wide_copy(model)
    found = sites(wide)
    for name, site in found.items():
        if site.weight.requires_grad:
            raise PropertyError(f"W of {name!r} must be frozen: call requires_grad_(False)")
    x = [t.detach().clone() for t in fitting(inputs, wide)]
    twin = DenseTwin(wide, sites)
    own: dict[str, Tensor] = {n: p for n, p in wide.named_parameters() if p.requires_grad}
    for name, site in found.items():
        own |= {f"{name}.lora_A": site.lora_A, f"{name}.lora_B": site.lora_B}
        scale = trained_scale(site)
        own |= {} if scale is None else {f"{name}.lora_scale": scale}
    floats = {f"input {i}": t.requires_grad_() for i, t in enumerate(x) if t.is_floating_point()}
    names = [n for n in twin.leaves if n in own and own[n].requires_grad]
    actual = gradients_of(wide(*x), {**{n: own[n] for n in names}, **floats})
    expected = gradients_of(twin(*x), {**{n: twin.leaves[n] for n in names}, **floats})
    largest = max((float(g.abs().max()) for g in expected.values()), default=0.0)
    for name in (*names, *floats):
        what = f"the gradient of {name!r} differs from the dense twin's"
        close(actual[name], expected[name], what, beside=largest)


def assert_merge_keeps_function(
    model: nn.Module, *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that a merge of all sites changes no output.

    Args:
        model: module with low-rank sites.
        inputs: inputs of one call of the model.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if an output changes.

    Examples:
        >>> from relora_core import register_low_rank
        >>> layer = register_low_rank(nn.Linear(3, 2), rank=1)
        >>> assert_merge_keeps_function(layer, torch.ones(1, 3))
    """
    wide = wide_copy(model)
    merged = copy.deepcopy(wide)
    for site in sites(merged).values():
        site.merge_()
    same_outputs(merged, wide, fitting(inputs, wide), "a merge changed the output")


def assert_merge_adds_update(model: nn.Module, *, sites: Sites = find_sites) -> None:
    """Assert that a merge sets W to W + s B A, rounded once, and changes nothing else.

    The allowed error is half a unit in W's last place, plus the rounding of a product in fp32 (or
    in W's dtype, if that is wider). W must stay the same frozen Parameter, B or A must become zero,
    and nothing else in the model may change.

    Args:
        model: module with low-rank sites.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if W, B or anything else is not as required.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_merge_adds_update(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    merged = copy.deepcopy(model)
    found = sites(merged)
    expected = {n: exact_weight(s) + exact_update(s) for n, s in found.items()}
    allowed = {n: _rounding(s) for n, s in found.items()}
    bases = {n: (s.weight, s.weight.dtype) for n, s in found.items()}
    with only_sites_change(merged, found, "a merge", buffers=True):
        for site in found.values():
            site.merge_()
    for name, site in found.items():
        W, dtype = bases[name]
        if site.weight is not W or W.dtype != dtype or W.requires_grad or W.grad_fn:
            raise PropertyError(
                f"a merge must write into W, which must stay the same frozen Parameter: {name!r}"
            )
        error = (exact_weight(site) - expected[name]).abs()
        if not bool((error <= allowed[name]).all()):
            worst = int((error / allowed[name].clamp(min=1e-300)).argmax())
            raise PropertyError(
                f"after a merge, W of {name!r} differs from W + s B A by "
                f"{error.flatten()[worst].item():.3g}; rounding explains at most "
                f"{allowed[name].flatten()[worst].item():.3g}"
            )
        if exact_update(site).any():
            raise PropertyError(f"a merge must zero B, or s B A is counted twice: {name!r}")


def assert_merge_is_idempotent(model: nn.Module, *, sites: Sites = find_sites) -> None:
    """Assert that a second merge changes nothing, bit for bit.

    Args:
        model: module with low-rank sites.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if the second merge changes anything.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_merge_is_idempotent(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    merged = copy.deepcopy(model)
    for _ in range(2):
        before = state_of(merged)
        for site in sites(merged).values():
            site.merge_()
    same_state(state_of(merged), before, "a second merge changed")


def assert_merges_add_up(
    model: nn.Module, *, sites: Sites = find_sites, may_lose: float = 0.05
) -> None:
    r"""Assert that W keeps what ten small merges add to it.

    $\lVert (W_{10} - W_0) - \sum_i s B_i A_i \rVert^2 \le$ `may_lose`$^2$
    $\cdot \sum_i \lVert s B_i A_i \rVert^2$, with each $\lVert s B_i A_i \rVert$ a thousandth of
    $\lVert W \rVert$. A bfloat16 W loses more than half; `split_bases_` keeps its missing bits.

    Args:
        model: module with low-rank sites.
        sites: function that finds the sites of your own layers.
        may_lose: largest fraction that may be lost.

    Raises:
        PropertyError: if the merges lose more.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_merges_add_up(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    merged = copy.deepcopy(model)
    for name, site in sites(merged).items():
        first = exact_weight(site)
        norm = float(first.norm()) or 1.0
        total = torch.zeros_like(first)
        for number in range(10):
            fill_B_(site, seed=number)
            size = float(exact_update(site).norm())
            if not size:
                break  # A is zero, which another property checks
            with torch.no_grad():
                site.lora_B.mul_(1e-3 * norm / size)
            total += exact_update(site)
            site.merge_()
            site.redraw_()
        added = 1e-3 * norm * math.sqrt(10)
        lost = float((exact_weight(site) - first - total).norm()) / added
        if not lost <= may_lose:
            raise PropertyError(
                f"ten small merges into W of {name!r} ({site.weight.dtype}) lost {lost:.0%} of "
                "what they added: keep W in fp32 (with split_bases_, or as float32)"
            )


def _rounding(site: LowRankSite) -> Tensor:
    """Return, for each entry, how far a rounded W may be from W + s B A."""
    W, total = exact_weight(site), exact_weight(site) + exact_update(site)
    A, B = site.lora_A.detach().double().abs(), site.lora_B.detach().double().abs()
    summed = W.abs() + abs(scale_of(site)) * (B @ A).view(W.shape)
    stored = site.weight.dtype
    if isinstance(site, Site) and site.low_rank.split_from is not None:
        stored = torch.float32
    computed = torch.promote_types(stored, torch.float32)
    unit = torch.finfo(computed).eps * summed * (A.shape[0] + 4)
    last_place = torch.finfo(stored).eps * torch.maximum(W.abs(), total.abs()) / 2
    return unit + last_place + torch.finfo(stored).smallest_normal

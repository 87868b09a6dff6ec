"""Assertions of the properties of a redraw: keyed draws, learning factors, and growing rank."""

import copy

import torch
from torch import Tensor, nn

from relora_core.testing.inputs import fitting
from relora_core.testing.subjects import (
    PropertyError,
    Sites,
    exact_update,
    exact_weight,
    fill_B_,
    find_sites,
    trained_scale,
    wide_copy,
)
from relora_core.testing.twin import DenseTwin, disturbed, gradients_of, only_sites_change


def assert_redraw_is_keyed(model: nn.Module, *, sites: Sites = find_sites) -> None:
    """Assert that a redraw depends only on state that all processes share.

    Copies of the model must draw the same A, bit for bit, even if torch's global generator is in
    different states. Each draw must differ from all earlier draws and from those of other sites. B
    must be zero, and W and everything else must stay the same.

    Args:
        model: module with low-rank sites.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if a draw repeats or differs between copies, or anything else changes.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_redraw_is_keyed(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    draws: list[dict[str, Tensor]] = []
    for process in range(2):
        with disturbed(process):
            drawn = copy.deepcopy(model)
            found = sites(drawn)
            bases = {name: exact_weight(site) for name, site in found.items()}
            taken = [site.lora_A.detach().clone() for site in found.values()]
            for scale in map(trained_scale, found.values()):
                if scale is not None:
                    scale.detach().mul_(2)  # so that a redraw that restores the scale is detected
            draws.append({})
            for number in (1, 2):
                for name, site in found.items():
                    with only_sites_change(drawn, found, "a redraw", buffers=False):
                        site.redraw_()
                    A = site.lora_A.detach()
                    if site.lora_B.any() or not torch.equal(exact_weight(site), bases[name]):
                        raise PropertyError(f"a redraw must zero B and keep W: {name!r}")
                    again = any(A.shape == B.shape and torch.equal(A, B) for B in taken)
                    if again and A.numel() > 1:  # a single entry may have only two values
                        raise PropertyError(
                            f"redraw {number} of {name!r} repeated an earlier A: seed the draw by "
                            "the site's name and the number of the restart"
                        )
                    taken.append(A.clone())
                    draws[-1][f"{name} at redraw {number}"] = taken[-1]
    for which, A in draws[0].items():
        if not torch.equal(A, draws[1][which]):
            raise PropertyError(
                f"two processes with different states of torch's global generator drew different A "
                f"for {which}: use a separate generator, seeded by (seed, name, restart)"
            )


def assert_learns(model: nn.Module, *inputs: Tensor, sites: Sites = find_sites) -> None:
    """Assert that every site learns: B from the first step of each cycle, A from the second.

    In the new model and after each of two restarts, B must have a gradient wherever W + s B A has
    one, and so must A after B has taken a step.

    Args:
        model: new module with low-rank sites.
        inputs: inputs of one call of the model.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if a factor has no gradient.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_learns(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    wide = wide_copy(model)
    x = fitting(inputs, wide)
    found = {name: site for name, site in sites(wide).items() if site.lora_B.requires_grad}
    for cycle in range(3):
        for which in ("lora_B", "lora_A"):
            twin = DenseTwin(wide, sites)
            factors = {name: getattr(site, which) for name, site in found.items()}
            result = twin(*x)
            dense = gradients_of(result, twin.whole)
            for name, gradient in gradients_of(wide(*x), factors).items():
                if not gradient.any() and dense[name].any():
                    when = f"after {cycle} restarts" if cycle else "before the first restart"
                    raise PropertyError(f"{which} of {name!r} has no gradient {when}")
                if gradient.any():
                    with torch.no_grad():
                        factors[name].sub_(gradient * (0.1 / gradient.norm()))
        for site in found.values():
            site.merge_()
            site.redraw_()


def assert_rank_grows(model: nn.Module, *, sites: Sites = find_sites) -> None:
    r"""Assert that $\mathrm{rank}(W_k - W_0) \le k r$, and that it grows with each restart.

    The assertion makes three restarts. The rank must grow until W has full rank; of a bank, the
    largest rank among its matrices is checked.

    Args:
        model: module with low-rank sites.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if the rank exceeds its bound or does not grow.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_rank_grows(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    wide = wide_copy(model)
    for name, site in sites(wide).items():
        first, rank = exact_weight(site), site.lora_A.shape[-2]
        bank = site.lora_A.ndim - 2
        most = min(first.shape[bank], first.shape[bank + 1 :].numel())
        before = 0
        for k in (1, 2, 3):
            fill_B_(site, seed=k)
            size = float(exact_update(site).norm())
            with torch.no_grad():  # make s B A as large as W
                site.lora_B.mul_((float(first.norm()) or 1.0) / (size or 1.0))
            site.merge_()
            site.redraw_()
            change = (exact_weight(site) - first).flatten(bank + 1)
            found = int(torch.linalg.matrix_rank(change, rtol=1e-6).max())
            if found > k * rank:
                raise PropertyError(
                    f"W of {name!r} has changed by rank {found} after {k} merges of rank {rank}, "
                    f"where {k * rank} is the most: a merge must add s B A and nothing else"
                )
            if k > 1 and found <= before < most:
                raise PropertyError(
                    f"W of {name!r} has changed by rank {found} after {k} merges of rank {rank}, "
                    f"and by rank {before} after {k - 1}: redraw A at each restart"
                )
            before = found

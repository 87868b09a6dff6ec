"""The properties of a redraw: keyed draws, factors that learn, a rank that grows."""

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
    """Assert that a redraw depends on nothing that processes may not have in common.

    Copies of the model that have used torch's global generator differently draw the same A, bit
    for bit; each draw is another than the one before and than that of another site; B is zero;
    W and all else stay.

    Args:
        model: with low-rank sites.
        sites: finds the sites of layers of your own.

    Raises:
        PropertyError: if not.

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
                    scale.detach().mul_(2)  # so that one that is taken back is seen
            draws.append({})
            for number in (1, 2):
                for name, site in found.items():
                    with only_sites_change(drawn, found, "a redraw", buffers=False):
                        site.redraw_()
                    A = site.lora_A.detach()
                    if site.lora_B.any() or not torch.equal(exact_weight(site), bases[name]):
                        raise PropertyError(f"a redraw must zero B and leave W: {name!r}")
                    again = any(A.shape == B.shape and torch.equal(A, B) for B in taken)
                    if again and A.numel() > 1:  # one entry may have two values only
                        raise PropertyError(
                            f"redraw {number} of {name!r} gave an A that there was already: key it "
                            "by the site's name and by the number of the restart"
                        )
                    taken.append(A.clone())
                    draws[-1][f"{name} at redraw {number}"] = taken[-1]
    for which, A in draws[0].items():
        if not torch.equal(A, draws[1][which]):
            raise PropertyError(
                f"two processes that had used torch's global generator differently drew another A "
                f"of {which}: draw from a generator of its own, seeded by (seed, name, restart)"
            )


def assert_learns(model: nn.Module, *inputs: Tensor, sites: Sites = find_sites) -> None:
    """Assert that every site learns: B from the first step of each cycle on, A from the second.

    As the model is, and after each of two restarts: that B has a gradient, and A once B has
    followed it, wherever W + s B A has one.

    Args:
        model: with low-rank sites, just made.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        PropertyError: if a factor has none.

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
                    when = f"after {cycle} restarts" if cycle else "at first"
                    raise PropertyError(f"{which} of {name!r} has no gradient {when}")
                if gradient.any():
                    with torch.no_grad():
                        factors[name].sub_(gradient * (0.1 / gradient.norm()))
        for site in found.values():
            site.merge_()
            site.redraw_()


def assert_rank_grows(model: nn.Module, *, sites: Sites = find_sites) -> None:
    r"""Assert that $\mathrm{rank}(W_k - W_0) \le k r$, and grows with each of three restarts.

    Until it is all that W has to give.

    Args:
        model: with low-rank sites.
        sites: finds the sites of layers of your own.

    Raises:
        PropertyError: if not.

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
            with torch.no_grad():  # as large as W, whatever the scale is
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
                    f"and by rank {before} after {k - 1}: A must be drawn anew"
                )
            before = found

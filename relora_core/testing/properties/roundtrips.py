"""The properties of saving, copying and removing: each cancels or commutes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from relora_core.files.weights import merged_state_dict
from relora_core.low_rank.register import low_rank_tensors, register_low_rank, remove_low_rank
from relora_core.sites.site import low_rank_sites
from relora_core.testing.inputs import fitting, outputs
from relora_core.testing.subjects import PropertyError, Sites, find_sites, wide_copy
from relora_core.testing.twin import disturbed, same_outputs, same_state, state_of


def assert_saves_and_loads(
    model: nn.Module, make: Callable[[], nn.Module], *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that a state dict holds all there is: loaded anew, the model goes on the same.

    After a redraw, a model that is made anew, from another state of the global generator, and loads
    it gives the same outputs, and after merges and redraws of both the same state, bit for bit.

    Args:
        model: with low-rank sites.
        make: returns another of its kind.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        PropertyError: if not.

    Examples:
        >>> from relora_core import register_low_rank
        >>> make = lambda: register_low_rank(nn.Linear(3, 2), rank=1)
        >>> assert_saves_and_loads(make(), make, torch.ones(1, 3))
    """
    one = copy.deepcopy(model).eval()
    for site in sites(one).values():  # so that there is a count of restarts to lose
        site.redraw_()
    with disturbed(3):
        other = make().eval()
        other.load_state_dict(state_of(one))
        x = fitting(inputs, one)
        with torch.no_grad():
            for y, again in zip(outputs(one(*x)), outputs(other(*x)), strict=True):
                if not torch.equal(y, again):
                    raise PropertyError("a model that loaded the state dict computes otherwise")
    for number in (1, 2):
        for process, which in enumerate((one, other)):
            with disturbed(process):
                found = sites(which)
                for site in found.values():
                    site.merge_()
                for site in found.values():
                    site.redraw_()
        what = f"restart {number} after saving and loading differs from one without in"
        same_state(state_of(other), state_of(one), what)


def assert_copies_are_independent(
    model: nn.Module, *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that a forward pass changes nothing, nor does a merge of a deep copy.

    Args:
        model: with low-rank sites.
        inputs: of one call of it.
        sites: finds the sites of layers of your own.

    Raises:
        PropertyError: if one does.

    Examples:
        >>> from relora_core import register_low_rank
        >>> layer = register_low_rank(nn.Linear(3, 2), rank=1)
        >>> assert_copies_are_independent(layer, torch.ones(1, 3))
    """
    one = copy.deepcopy(model).eval()
    before = state_of(one)
    other = copy.deepcopy(one)
    with torch.no_grad():
        one(*fitting(inputs, one))
    same_state(state_of(one), before, "a forward pass changed")
    for site in sites(other).values():
        site.merge_()
        site.redraw_()
    same_state(state_of(one), before, "a merge of a deep copy changed")


def assert_removal_cancels(model: nn.Module, *inputs: Tensor) -> None:
    """Assert that register and remove cancel, and that removal after a merge keeps the function.

    Of sites of this library: the Parameters of the plain module are the same objects, in the same
    order, with the same bits, however often sites come and go; merged, the plain module computes
    the same, and has the state that `merged_state_dict` gives.

    Args:
        model: with low-rank sites.
        inputs: of one call of it.

    Raises:
        PropertyError: if not.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_removal_cancels(register_low_rank(nn.Linear(3, 2), rank=1), torch.ones(1, 3))
    """
    plain = copy.deepcopy(model)
    places = [(site, site.low_rank) for _, site in low_rank_sites(plain)]
    for site, _ in places:
        remove_low_rank(site.module, site.tensor_name, merge=False)
    first = [(name, p, p.detach().clone()) for name, p in plain.named_parameters()]
    for site, low_rank in places:
        rank, dims = low_rank.rank, low_rank.batch_dims
        register_low_rank(site.module, site.tensor_name, rank=rank, batch_dims=dims)
    for site, _ in places:
        remove_low_rank(site.module, site.tensor_name)
    again = list(plain.named_parameters())
    if [name for name, *_ in first] != [name for name, _ in again]:
        raise PropertyError("register and remove changed the Parameters' names or their order")
    for (name, p, value), (_, same) in zip(first, again, strict=True):
        if p is not same or not torch.equal(value, same.detach()):
            raise PropertyError(
                f"register and remove changed {name!r}, or put another in its place"
            )

    wide = wide_copy(model)
    merged = copy.deepcopy(wide)
    state = copy.deepcopy(merged_state_dict(merged))
    for _, site in list(low_rank_sites(merged)):
        remove_low_rank(site.module, site.tensor_name)
    same_outputs(merged, wide, fitting(inputs, wide), "removing the merged sites moved the output")
    same_state(state_of(merged), state, "merged_state_dict is not the merged module's state:")


def assert_export_is_merged(model: nn.Module) -> None:
    """Assert that an export has W + s B A of every site under its plain name, and no factor.

    Whatever wraps the model and answers for it. For this library's sites.

    Args:
        model: with low-rank sites.

    Raises:
        PropertyError: if not.

    Examples:
        >>> from relora_core import register_low_rank
        >>> assert_export_is_merged(register_low_rank(nn.Linear(3, 2), rank=1))
    """
    expected = copy.deepcopy(model)
    for module in list(expected.modules()):
        for tensor_name in low_rank_tensors(module):
            remove_low_rank(module, tensor_name)
    plain = expected.state_dict()
    for wrapped in (model, _Delegating(model)):
        found = merged_state_dict(wrapped)
        if found.keys() != plain.keys():
            other = sorted(found.keys() ^ plain.keys())
            raise PropertyError(f"an export has other names than the plain module: {other}")
        for name, value in plain.items():
            tensors = isinstance(value, Tensor)
            if not (torch.equal(found[name], value) if tensors else found[name] == value):
                raise PropertyError(f"{name} of an export is not what a merge makes of it")


class _Delegating(nn.Module):
    """A wrapper that answers for what is in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.state_dict(*args, **kwargs)

"""Assertions that saving, copying and removing cancel or commute with other operations."""

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
    """Assert that a state dict is complete: a model that loads it continues identically.

    The model is redrawn and saved. A new model, made with another state of the global generator,
    loads the state dict. It must give the same outputs, and after merges and redraws of both models
    it must have the same state, bit for bit.

    Args:
        model: module with low-rank sites.
        make: function that returns a new model of the same kind.
        inputs: inputs of one call of the model.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if an output or a state differs.

    Examples:
        >>> from relora_core import register_low_rank
        >>> make = lambda: register_low_rank(nn.Linear(3, 2), rank=1)
        >>> assert_saves_and_loads(make(), make, torch.ones(1, 3))
    """
    one = copy.deepcopy(model).eval()
    for site in sites(one).values():  # so that the restart count is not zero
        site.redraw_()
    with disturbed(3):
        other = make().eval()
        other.load_state_dict(state_of(one))
        x = fitting(inputs, one)
        with torch.no_grad():
            for y, again in zip(outputs(one(*x)), outputs(other(*x)), strict=True):
                if not torch.equal(y, again):
                    raise PropertyError("a model that loaded the state dict has other outputs")
    for number in (1, 2):
        for process, which in enumerate((one, other)):
            with disturbed(process):
                found = sites(which)
                for site in found.values():
                    site.merge_()
                for site in found.values():
                    site.redraw_()
        what = f"restart {number} after saving and loading differs from one without a save in"
        same_state(state_of(other), state_of(one), what)


def assert_copies_are_independent(
    model: nn.Module, *inputs: Tensor, sites: Sites = find_sites
) -> None:
    """Assert that neither a forward pass nor a merge of a deep copy changes the model.

    Args:
        model: module with low-rank sites.
        inputs: inputs of one call of the model.
        sites: function that finds the sites of your own layers.

    Raises:
        PropertyError: if the model's state changes.

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
    """Assert that register and remove cancel, and that a merge before removal keeps the function.

    This applies to this library's sites. After sites are registered and removed, the plain module's
    Parameters must be the same objects, in the same order, with the same bits. After a merge and
    removal, the plain module must compute the same function and have the state that
    `merged_state_dict` returns.

    Args:
        model: module with low-rank sites.
        inputs: inputs of one call of the model.

    Raises:
        PropertyError: if a Parameter, an output or the state differs.

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
                f"register and remove changed {name!r}, or replaced it by another Parameter"
            )

    wide = wide_copy(model)
    merged = copy.deepcopy(wide)
    state = copy.deepcopy(merged_state_dict(merged))
    for _, site in list(low_rank_sites(merged)):
        remove_low_rank(site.module, site.tensor_name)
    same_outputs(merged, wide, fitting(inputs, wide), "removing merged sites changed the output")
    same_state(state_of(merged), state, "merged_state_dict differs from the merged module in")


def assert_export_is_merged(model: nn.Module) -> None:
    """Assert that an export holds W + s B A of every site under its plain name, and no factors.

    This must also hold for a wrapper that delegates `state_dict` to the model. It applies to this
    library's sites.

    Args:
        model: module with low-rank sites.

    Raises:
        PropertyError: if a name or a value differs from the merged module's.

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
            raise PropertyError(f"an export and the plain module differ in the names {other}")
        for name, value in plain.items():
            tensors = isinstance(value, Tensor)
            if not (torch.equal(found[name], value) if tensors else found[name] == value):
                raise PropertyError(f"{name!r} in an export must be its merged value; it differs")


class _Delegating(nn.Module):
    """A wrapper that delegates `state_dict` to the module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.state_dict(*args, **kwargs)

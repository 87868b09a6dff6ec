"""Merged copies: W + s B A of each linear site in the computation's dtype, made once a step."""

from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from relora_core._torch_private import has_post_load_hook
from relora_core.distributed.fsdp import fsdp_owns, reshard_owners_
from relora_core.distributed.local import is_sharded
from relora_core.distributed.sharding import copy_all_, gathered, sharded_rows
from relora_core.low_rank.parametrization import LowRank
from relora_core.low_rank.register import low_rank_owner
from relora_core.sites.site import Site, low_rank_sites, sites_of

# How much is gathered at once: an eighth of all copies, and at most so many bytes.
_RUNS, _AT_ONCE = 8, 2**28
# In order of registration, which is the same on every process, because a refresh communicates.
_owners: WeakValueDictionary[int, ParametrizationList] = WeakValueDictionary()
_numbers = count()


def keep_merged_(
    model: nn.Module, *, dtype: torch.dtype = torch.bfloat16, mesh: DeviceMesh | None = None
) -> list[nn.Parameter]:
    r"""Keep $V = W + s B A$ of every linear site, rounded once to `dtype`, beside $W$.

    Forward is then one product; backward is one product and the factors' gradients. Two paths take
    more passes over activations, and on a GPU those passes cost more than their arithmetic.
    Mixed-precision training at full rank also computes with a rounded weight. A restart keeps V bit
    for bit.

    V is rebuilt after each step of a torch optimizer that holds its factors, and by `restart_`,
    `merge_`, `reinit_` and `load_state_dict` of `model`. In eager mode, a forward also notices any
    other write to W, A or B. When compiled or under FSDP2 it does not: call `refresh_merged_` after
    such a write, and use no optimizer that computes the loss several times per step (LBFGS). A
    forward in another dtype, with dropout, or over a W that is trained or no wider than V, does not
    use V.

    V takes the memory of one more W in `dtype`. It is stored in `merged_copy`, a frozen Parameter
    of shape `(out, in + rank)`, rounded up to a multiple of 8 columns. FSDP2 shards and gathers it
    like any Parameter, but it is in no state dict. With `mesh`, W is sharded by rows here; pass the
    returned list as `ignored_params`, so that FSDP2 does not gather W.

    Args:
        model: a model with low-rank sites, before `fully_shard`.
        dtype: the dtype of the computation, bfloat16 or float16.
        mesh: the mesh of FSDP2. W is sharded by rows over the mesh's last dimension; if None, W
            stays unsharded.

    Returns:
        Every W that has a copy, for `ignored_params`.

    Raises:
        ValueError: if there is no linear site; if a linear site has dropout, a trained scale, or a
            W that is trained, sharded or no wider than `dtype`. Nothing is changed.
        TypeError: if `dtype` is neither bfloat16 nor float16.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> _ = keep_merged_(model)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     model(torch.ones(1, 6)).dtype
        torch.bfloat16
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be torch.bfloat16 or torch.float16; got {dtype}")
    linear = [(name, site) for name, site in sites_of(model) if _is_linear(site)]
    if not linear:
        raise ValueError("the model has no low-rank nn.Linear, and other sites keep no merged copy")
    fresh = [(name, site) for name, site in linear if not site.low_rank.followed]
    if not fresh:
        raise ValueError(f"all {len(linear)} linear sites keep a merged copy already")
    for name, site in fresh:
        if site.low_rank.merged_copy is None:  # in a deep copy, it is there already
            _check(name, site, dtype)
    for _, site in fresh:
        _keep_(site, dtype, mesh)
    return [site.weight for _, site in linear]


def _keep_(site: Site, dtype: torch.dtype, mesh: DeviceMesh | None) -> None:
    owner = low_rank_owner(site.module, site.tensor_name)
    if site.low_rank.merged_copy is None:
        site.low_rank._keep_merged_(site.weight, dtype)
        if mesh is not None and not is_sharded(site.weight):
            owner.original = nn.Parameter(sharded_rows(site.weight, mesh), requires_grad=False)
    site.low_rank.followed = True
    _owners[next(_numbers)] = owner
    if not has_post_load_hook(owner, _refresh_loaded):
        # Torch has no types for it.
        owner.register_load_state_dict_post_hook(_refresh_loaded)  # type: ignore[no-untyped-call]


def refresh_merged_(model: nn.Module) -> nn.Module:
    """Rebuild the merged copies of `model`; sites without one are left alone.

    Every process must call this, because under FSDP2 A is gathered.

    Returns:
        `model`.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> _ = refresh_merged_(model)
    """
    sites = [site for _, site in low_rank_sites(model)]
    _refresh_([low_rank_owner(site.module, site.tensor_name) for site in sites])
    return model


def _refresh_loaded(owner: nn.Module, keys: Any) -> None:
    assert isinstance(owner, ParametrizationList)
    _refresh_([owner])


def _is_linear(site: Site) -> bool:
    return isinstance(site.module, nn.Linear) and site.tensor_name == "weight"


def _check(name: str, site: Site, dtype: torch.dtype) -> None:
    low_rank, W = site.low_rank, site.weight
    if low_rank.dropout or low_rank.lora_scale is not None:
        what = "dropout" if low_rank.dropout else "a trained scale"
        raise ValueError(f"{name} has {what}, which needs two paths: register it without")
    if W.requires_grad:
        raise ValueError(f"{name}: W must be frozen; it has requires_grad=True")
    if is_sharded(W) or is_sharded(site.lora_A):
        raise ValueError(f"{name} is sharded already: call keep_merged_ before fully_shard")
    if low_rank.split_from is not None or W.dtype.itemsize <= dtype.itemsize:
        raise ValueError(
            f"{name}: W must be wider than {dtype}, or V would lose what is smaller than W's "
            f"rounding; got {W.dtype}"
        )


@torch.no_grad()
def _refresh_(owners: Sequence[ParametrizationList]) -> None:
    """Rebuild copies, a run of sites at a time; the factors of a run are gathered together."""
    reshard_owners_(module for owner in owners for module in (owner, *owner))
    sites = [pair for pair in map(_pair, owners) if _has_copy(pair[0])]
    for some in _runs(sites):
        factors = gathered([low_rank.lora_A.detach() for low_rank, _ in some])
        copies = []
        for (low_rank, W), A in zip(some, factors, strict=True):
            rows, own = low_rank._rows_of_copy(W)
            low_rank._make_rows_(rows, low_rank._delta(W, A))
            assert low_rank.merged_copy is not None
            if not own:
                copies.append((low_rank.merged_copy, rows, W))
        copy_all_(copies)
        for low_rank, W in some:
            low_rank._note_made(W)


def _pair(owner: ParametrizationList) -> tuple[LowRank, nn.Parameter]:
    low_rank, W = owner[0], owner.original
    assert isinstance(low_rank, LowRank)
    assert isinstance(W, nn.Parameter)
    return low_rank, W


def _has_copy(low_rank: LowRank) -> bool:
    return low_rank.merged_copy is not None and not low_rank.lora_A.is_meta


def _runs(
    sites: list[tuple[LowRank, nn.Parameter]],
) -> Iterator[list[tuple[LowRank, nn.Parameter]]]:
    """Iterate over runs of sites, each a small part of all sites and of bounded size."""
    copies = (low_rank.merged_copy for low_rank, _ in sites)
    total = sum(copy.nbytes for copy in copies if copy is not None)
    runs = min(len(sites), max(_RUNS, -(-total // _AT_ONCE)))
    bounds = [index * len(sites) // runs for index in range(runs + 1)] if runs else []
    for start, stop in pairwise(bounds):
        yield sites[start:stop]


def _refresh_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    owners = list(_owners.values())
    if not owners:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def moved(owner: ParametrizationList) -> bool:
        low_rank, _ = _pair(owner)
        return id(low_rank.lora_A) in stepped or id(low_rank.lora_B) in stepped

    # While FSDP2 holds gathered copies, they hide the Parameters that the optimizer steps.
    others = [_pair(owner)[0] for owner in owners if not moved(owner)]
    reshard_owners_(one for one in others if not is_sharded(one.lora_A) and fsdp_owns(one))
    _refresh_([owner for owner in owners if moved(owner)])


register_optimizer_step_post_hook(_refresh_after_step)

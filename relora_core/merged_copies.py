"""Merged copies: W + s B A of each linear site in the computation's dtype, made once a step."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from relora_core._sharding import is_sharded, sharded_rows
from relora_core.register import low_rank_owner
from relora_core.sites import Site, low_rank_sites, sites_of

_models: WeakSet[nn.Module] = WeakSet()


def keep_merged_(
    model: nn.Module, *, dtype: torch.dtype = torch.bfloat16, mesh: DeviceMesh | None = None
) -> list[nn.Parameter]:
    r"""Keep $V = W + s B A$ of every linear site, rounded once to `dtype`, beside $W$.

    Forward is then one product, and backward one with the factors' gradients: fewer passes over
    activations than two paths take, which on a GPU cost more than their arithmetic. V is what
    mixed-precision training at full rank computes with. It is made anew after each step of an
    optimizer that has factors of `model`, and by `restart_`, `merge_`, `reinit_` and the loading
    of weights; after any other write to W, A or B, call `refresh_merged_`. A restart leaves V as
    it is, to the bit.

    V takes the memory of one more W in `dtype`, beside W as it is: for W in fp32. It is a
    Parameter that is not trained, `merged_copy`, `(out, in + rank)` rounded up to a multiple of
    8 columns, so that FSDP2 shards and gathers it; it is in no state dict, and a deep copy of the
    model does without. W is read at a refresh only: shard it here, over the mesh of FSDP2, and
    leave it out of `fully_shard` by its `ignored_params`.

    Args:
        model: with low-rank sites; before `fully_shard`.
        dtype: of the computation: bfloat16 or float16.
        mesh: of FSDP2, over whose last dimension W is sharded by rows; None: W stays whole.

    Returns:
        Every W that has a copy, for `ignored_params`.

    Raises:
        ValueError: if there is no linear site; or one has dropout, a trained scale, a trained W or
            a W that is sharded or of no wider dtype. Nothing is changed.
        TypeError: if `dtype` is another.

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
        raise ValueError("the model has no low-rank site of an nn.Linear: others keep no copy")
    for name, site in linear:
        _check(name, site, dtype)
    for _, site in linear:
        site.low_rank.keep_merged_(site.weight, dtype)
        if mesh is not None:
            owner = low_rank_owner(site.module, site.tensor_name)
            owner.original = nn.Parameter(sharded_rows(site.weight, mesh), requires_grad=False)
    # Torch has no types for it.
    model.register_load_state_dict_post_hook(_refresh_loaded)  # type: ignore[no-untyped-call]
    _models.add(model)
    return [site.weight for _, site in linear]


def refresh_merged_(model: nn.Module) -> None:
    """Make the merged copies of `model` anew; for sites without one there is nothing to do.

    Every process must call it: under FSDP2 A is gathered.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> refresh_merged_(model)
    """
    for _, site in sites_of(model):
        site.refresh_()


def _refresh_loaded(model: nn.Module, keys: Any) -> None:
    refresh_merged_(model)


def _is_linear(site: Site) -> bool:
    return isinstance(site.module, nn.Linear) and site.tensor_name == "weight"


def _check(name: str, site: Site, dtype: torch.dtype) -> None:
    low_rank, W = site.low_rank, site.weight
    if low_rank.merged_copy is not None:
        raise ValueError(f"{name} keeps a merged copy already")
    if low_rank.dropout or low_rank.lora_scale is not None:
        what = "dropout" if low_rank.dropout else "a trained scale"
        raise ValueError(f"{name} has {what}, which needs two paths: register it without")
    if W.requires_grad:
        raise ValueError(f"{name}: W must be frozen; it has requires_grad=True")
    if is_sharded(W) or is_sharded(site.lora_A):
        raise ValueError(f"{name} is sharded already: keep merged copies before fully_shard")
    if low_rank.split_from is not None or W.dtype.itemsize <= dtype.itemsize:
        raise ValueError(
            f"{name}: W must be wider than {dtype}, or V would lose what is smaller than W's "
            f"rounding; got {W.dtype}"
        )


def _refresh_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped: set[int] | None = None
    for model in list(_models):
        factors = (f for _, s in low_rank_sites(model) for f in (s.lora_A, s.lora_B))
        stepped = stepped or {id(p) for group in optimizer.param_groups for p in group["params"]}
        if _any_in(factors, stepped):
            refresh_merged_(model)


def _any_in(factors: Iterable[nn.Parameter], ids: set[int]) -> bool:
    return any(id(factor) in ids for factor in factors)


register_optimizer_step_post_hook(_refresh_after_step)

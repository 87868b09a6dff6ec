"""The frozen bases in 16 bits on the device, without losing what a merge adds to them."""

from typing import Any

import torch
from torch import nn

from relora_core.distributed.local import is_sharded
from relora_core.low_rank.low_bits import split
from relora_core.low_rank.register import low_rank_owner
from relora_core.sites.site import sites_of


def split_bases_(model: nn.Module) -> nn.Module:
    """Store each site's W as the nearest bfloat16, and the 16 bits below it in host memory.

    Forward and backward use the bfloat16 half. A merge adds s B A to the fp32 value of both halves,
    so even a small update is not lost. (A merge into a W of bfloat16 alone rounds most of a small
    update away.) W takes 2 bytes per entry on its device and 2 on the host, which are accessed only
    at merges. A and B keep their dtype; they may be fp32, for example, and be cast to bfloat16 by
    autocast or by FSDP2's mixed precision.

    W must be whole on this process: on one device, left out of FSDP2
    (`fully_shard(ignored_params=...)`), or under DDP (split after wrapping, because wrapping makes
    the processes' weights equal). The state dict then has `low_bits` (int16) beside W; a state dict
    with an fp32 W is split when it is loaded. `merged_state_dict` gives the dtype that W had. Write
    to W by hand, or convert it by `to`, only before the split.

    Args:
        model: a model with low-rank sites, whose W are fp32 or bfloat16. A model on the meta device
            may be split too, and is then filled by `load_state_dict`.

    Returns:
        `model`.

    Raises:
        ValueError: if there is no site, or a W is sharded or split already. Nothing is changed.
        TypeError: if a W has another dtype. Nothing is changed.

    Examples:
        >>> from relora_core import add_low_rank_, low_rank_sites
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> _ = split_bases_(model)
        >>> [(site.weight.dtype, site.lora_A.dtype) for _, site in low_rank_sites(model)]
        [(torch.bfloat16, torch.float32)]
    """
    sites = sites_of(model)
    for name, site in sites:
        if is_sharded(site.weight):
            raise ValueError(
                f"{name}: only a whole W can be split, and this one is sharded: leave it out of "
                "FSDP2 by fully_shard(ignored_params=...), or keep it in float32"
            )
        if site.low_rank.split_from is not None:
            raise ValueError(f"{name} is split already")
        if site.low_rank.merged_copy is not None:
            raise ValueError(f"{name} keeps a merged copy: leave keep_merged_ or split_bases_ out")
        if site.weight.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"{name}: W must be float32 or bfloat16; got {site.weight.dtype}")
    for _, site in sites:
        site.low_rank._split_(site.weight)
        owner = low_rank_owner(site.module, site.tensor_name)
        # Torch has no types for it.
        owner.register_load_state_dict_pre_hook(_both_halves)  # type: ignore[no-untyped-call]
    return model


def _both_halves(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Put both halves of W into a state dict that is being loaded; a `load_state_dict` hook.

    An fp32 W is split. A bfloat16 W without low bits is exact, so its low bits are zero.
    """
    value, key = state_dict.get(prefix + "original"), prefix + "0.low_bits"
    if value is not None and value.dtype == torch.float32:
        upper, low = split(value)
        state_dict |= {prefix + "original": upper, key: low}
    elif value is not None and key not in state_dict:
        state_dict[key] = torch.zeros(value.shape, dtype=torch.int16, device="cpu")

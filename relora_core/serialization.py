"""Plain weights out of a model with low-rank sites."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from relora_core._sharding import full
from relora_core.files import replaced
from relora_core.register import low_rank_tensors
from relora_core.sites import Site, clean_name, unwrapped


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state dict as if it had never had low-rank sites.

    Every site's `weight` is W + s B A under its plain name, and no wrapper shows in any name, so
    that it loads into the plain module. The model is not changed. Sharded tensors stay sharded;
    tensors that are not sites share memory with the model.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> sorted(merged_state_dict(model))
        ['0.bias', '0.weight']
    """
    return _plain(model, Site.merged)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of the plain module is loaded into: the model's own memory.

    Every site's base W stands under its plain name, without B A. Copy a full-rank warm start into
    these tensors and the sites continue from it.

    Raises:
        ValueError: if a W is split (`split_bases_`), so that no memory holds all of it.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> with torch.no_grad():
        ...     _ = base_state_dict(model)["0.weight"].fill_(1.0)
        >>> model[0].parametrizations.weight.original[0]
        tensor([1., 1., 1., 1., 1., 1.])
    """
    return _plain(model, _memory)


def save_merged(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the merged weights to `directory/model.safetensors` under plain names.

    Every rank must call it; sharded tensors are gathered one at a time and rank 0 writes. The
    file appears whole or not at all, and the other ranks do not wait for it.

    Args:
        model: with or without low-rank sites; not changed.
        directory: made if absent.

    Returns:
        The file's path.

    Examples:
        >>> import tempfile
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> save_merged(model, tempfile.mkdtemp()).name
        'model.safetensors'
    """
    path = Path(directory) / "model.safetensors"
    writes = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {}
    for name, tensor in merged_state_dict(model).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"safetensors holds tensors only; {name} is {type(tensor).__name__}")
        whole = full(tensor)
        if writes:
            # Tied tensors are written once each: a reader expects every name.
            tensors[name] = whole.detach().cpu().clone(memory_format=torch.contiguous_format)
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    return path


def _memory(site: Site) -> Tensor:
    if site.low_rank.split_from is not None:
        raise ValueError(
            "a W that split_bases_ has split cannot be filled through its memory: fill it before "
            "the split, or load a state dict that has its low_bits"
        )
    return site.weight.detach()


@torch.no_grad()
def _plain(model: nn.Module, tensor_of: Callable[[Site], Tensor]) -> dict[str, Tensor]:
    model = unwrapped(model)
    sites: dict[str, tuple[str, Site]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = clean_name(module_name) + "." if clean_name(module_name) else ""
        for tensor_name in low_rank_tensors(module):
            inside = f"{prefix}parametrizations.{tensor_name}"
            sites[inside] = (prefix + tensor_name, Site(module, tensor_name))

    plain: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        key = clean_name(key)
        if key.removesuffix(".original") in sites:
            name, site = sites[key.removesuffix(".original")]
            plain[name] = tensor_of(site)
        elif key.rsplit(".", 2)[0] not in sites:  # not <site>.0.lora_A and the like
            plain[key] = tensor
    return plain

"""Plain weights out of a model with low-rank sites."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora_core.distributed.sharding import full
from relora_core.files.whole import replaced, write_tensors
from relora_core.low_rank.ties import memory_of
from relora_core.sites.site import (
    Site,
    clean_name,
    low_rank_sites,
    plain_name,
    refuse_torn,
    refuse_unsupported,
    unwrapped,
)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state dict as if it had never had low-rank sites.

    Every site's `weight` is W + s B A under its plain name, and names contain no wrappers, so the
    state dict loads into the plain module. The model is not changed. Sharded tensors stay sharded;
    tensors that are not sites share memory with the model.

    Raises:
        ValueError: if the state dict of `model` lacks a site, because a wrapper renames or copies
            its entries; under FSDP1; after an interrupted merge.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> sorted(merged_state_dict(model))
        ['0.bias', '0.weight']
    """
    return _plain(model, Site.merged)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the plain module's state dict, in the model's own memory, to load a checkpoint into.

    Every site's base W is under its plain name, without B A. Copy a full-rank warm start into
    these tensors and the sites continue from it.

    Raises:
        ValueError: if a W is split (`split_bases_`), because no single tensor then holds all of it.

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

    Every process must call this; sharded tensors are gathered one at a time, and process rank 0
    writes. The file appears whole or not at all. The other processes do not wait for it.

    Args:
        model: a model with or without low-rank sites; it is not changed.
        directory: the directory to write to, made if absent.

    Returns:
        The file's path.

    Raises:
        ValueError: as `merged_state_dict` does.
        OSError: if the file cannot be written.

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
            # Tied tensors are written once under each name, because readers expect every name.
            tensors[name] = whole.detach().cpu().clone(memory_format=torch.contiguous_format)
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            write_tensors(tensors, partial, {"format": "pt"})
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
    """Return the state dict with each site's tensors in place of W, A and B.

    Sites are found in it by W's memory, not by W's name, because wrappers rename entries and
    forward attributes.
    """
    refuse_unsupported(model)
    model = unwrapped(model)
    sites = list(low_rank_sites(model))
    refuse_torn(sites)
    state = model.state_dict()  # first, because under FSDP2 it reshards gathered parameters
    by_memory = {memory_of(site.weight): site for _, site in sites}
    inside: dict[str, tuple[str, Site]] = {}
    for key, tensor in state.items():
        key = clean_name(key)
        found = by_memory.get(memory_of(tensor)) if _is_base(key, tensor) else None
        if found is not None:
            inside[key.removesuffix("original")] = (plain_name(key), found)
    if len(by_memory) < len(sites):
        raise ValueError("two low-rank sites share one W: untie them, with a copy of W for each")
    met = {id(site) for _, site in inside.values()}
    missed = [name for name, site in sites if id(site) not in met]
    if missed:
        raise ValueError(
            f"the state dict of {type(model).__name__} lacks the W of {len(missed)} low-rank sites "
            f"(first: {missed[0] or 'the module itself'}), because this wrapper renames or copies "
            "them: give the model inside it"
        )

    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        key = clean_name(key)
        within = next((one for one in _prefixes(key) if one in inside), None)
        if within is None:
            plain[key] = tensor
        elif key == within + "original":
            plain[inside[within][0]] = tensor_of(inside[within][1])
    return plain


def _is_base(key: str, tensor: object) -> bool:
    """Whether an entry may be the W of a site."""
    names = key.split(".")[-3:]
    lists = names[0] == "parametrizations" and names[-1] == "original"
    return lists and isinstance(tensor, Tensor)


def _prefixes(key: str) -> Iterator[str]:
    """Iterate over the prefixes of a key that end with a dot."""
    parts = key.split(".")
    return (".".join(parts[:end]) + "." for end in range(1, len(parts)))

"""The factors of the current cycle, as files that PEFT reads and writes."""

import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora_core.distributed.consensus import agreed
from relora_core.distributed.sharding import copy_from_full_, full
from relora_core.files.peft_format import (
    CONFIG,
    TENSORS,
    Form,
    configuration,
    form_of,
    read_scales,
    read_tensors,
)
from relora_core.files.whole import replaced, write_tensors
from relora_core.low_rank.register import bank_names
from relora_core.optim.moments import renew_copies_
from relora_core.optim.stepped import steppers
from relora_core.sites.site import Site, refuse_under_way, sites_of

_PREFIX = "base_model.model."
_PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class _Key:
    """What PEFT's files have no place for: the key of the draws and the exact trained scale."""

    seed: int
    restart: int
    scale: float


def save_adapters(
    model: nn.Module, directory: str | os.PathLike[str], *, base: str | None = None
) -> Path:
    """Write A and B of every site as a PEFT adapter, which `PeftModel.from_pretrained` reads.

    The adapter belongs to the model's current W, after the merges so far: save W (the state dict)
    with it. The adapter does not contain other trained parameters, such as biases and norms. The
    seed and restart number of each site are saved in the file's metadata, which PEFT ignores. Every
    process must call this; sharded factors are gathered one at a time, and process rank 0 writes.

    Args:
        model: a model with low-rank sites on the weights of Linear, Embedding or Conv1d to Conv3d,
            or on banks of experts; it is not changed.
        directory: the directory to write to, made if absent. Each of the two files in it,
            `adapter_model.safetensors` and `adapter_config.json`, is replaced whole.
        base: the name or path of the base model, for PEFT's config.

    Returns:
        The directory.

    Raises:
        ValueError: if there is no site, if PEFT's format cannot hold a site, if a factor is not
            finite, or if a restart was interrupted. Nothing is written then.

    Examples:
        >>> import tempfile
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> sorted(path.name for path in save_adapters(model, tempfile.mkdtemp()).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']

    Reference: https://github.com/huggingface/peft, LoRA's checkpoint format.
    """
    directory = Path(directory)
    sites = dict(sites_of(model))
    refuse_under_way(sites.items())
    forms = {name: _form(name, site) for name, site in sites.items()}
    writes = not dist.is_initialized() or dist.get_rank() == 0
    scales = {name: site.scale for name, site in sites.items()}
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        A, B = full(site.lora_A.detach()), full(site.lora_B.detach())
        if not (A.isfinite().all() and B.isfinite().all() and math.isfinite(scales[name])):
            raise ValueError(f"{name}: a factor or the scale is not finite")
        if writes:
            tensors |= {
                _PREFIX + key: tensor.cpu().clone(memory_format=torch.contiguous_format)
                for key, tensor in forms[name].to_peft(A, B).items()
            }
    ranks = {forms[name].target: site.rank for name, site in sites.items()}
    by_target = {forms[name].target: scale for name, scale in scales.items()}
    banks = [form.target for form in forms.values() if form.is_bank]
    described = configuration(ranks, by_target, base and os.fspath(base), banks)
    config = json.dumps(described, indent=2)
    keys = {n: asdict(_Key(s.low_rank.seed, s.restart, scales[n])) for n, s in sites.items()}
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "relora": json.dumps(keys)}
        with replaced(directory / CONFIG) as written, replaced(directory / TENSORS) as partial:
            write_tensors(tensors, partial, metadata)
            written.write_text(config + "\n", encoding="utf-8")
    return directory


def load_adapters(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Fill A and B of every site from a PEFT adapter, whichever library wrote it.

    The adapter must cover exactly the model's sites, with the same ranks and scales; a trained
    scale takes the adapter's value. If `save_adapters` wrote the adapter, the sites continue with
    its seeds and restart numbers, so the next redraw is the one that the saved model would have
    made. Every process must call this, and reads the files itself. An optimizer's own copies of the
    factors, such as schedule-free's `z`, are set to the loaded values; moments do not change.

    Args:
        model: a model with low-rank sites, sharded or not.
        directory: the directory of the adapter.

    Raises:
        ValueError: if a file is absent or damaged, describes something other than W + s B A, or
            does not fit the model; if the model's parameters are FSDP's gathered copies. Nothing
            is changed then.
        OutOfStepError: if only some of the processes that share the model call this, or one of
            them raises an error. Nothing is changed then.

    Examples:
        >>> import tempfile
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> load_adapters(model, save_adapters(model, tempfile.mkdtemp()))
    """
    sites = dict(sites_of(model))
    with agreed(model, f"load_adapters of {len(sites)} sites", _PATIENCE):
        refuse_under_way(sites.items())
        found = _read(sites, Path(directory))
    with torch.no_grad():
        for name, (A, B, scale, key) in found.items():
            low_rank = sites[name].low_rank
            copy_from_full_(low_rank.lora_A, A)
            copy_from_full_(low_rank.lora_B, B)
            if low_rank.lora_scale is not None:
                copy_from_full_(low_rank.lora_scale, scale)
            if key is not None:
                low_rank.seed, low_rank.restart = key.seed, key.restart
            sites[name].refresh_()
    factors = [p for name in found for p in (sites[name].lora_A, sites[name].lora_B)]
    for optimizer in steppers():
        renew_copies_(optimizer, factors)


_Found = tuple[Tensor, Tensor, Tensor, _Key | None]


def _read(sites: dict[str, Site], directory: Path) -> dict[str, _Found]:
    """Return what is to be copied into each site, or raise what `load_adapters` raises."""
    scales = read_scales(directory / CONFIG)
    tensors, metadata = read_tensors(directory / TENSORS)
    keys = _keys(metadata, directory / TENSORS)
    forms = {name: _form(name, site) for name, site in sites.items()}
    expected = {f"{_PREFIX}{form.place}.{key}" for form in forms.values() for key in form.keys}
    if expected != tensors.keys():
        absent, other = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise ValueError(
            f"{directory} does not fit the model: it lacks {len(absent)} tensors (first: "
            f"{absent[:3]}) and has {len(other)} that the model lacks (first: {other[:3]})"
        )
    found = {}
    for name, site in sites.items():
        site.low_rank._refuse_gathered()
        own = [tensors[f"{_PREFIX}{forms[name].place}.{key}"] for key in forms[name].keys]
        shapes = [tuple(tensor.shape) for tensor in own]
        if shapes != list(forms[name].shapes(site.rank)):
            raise ValueError(
                f"{directory}: factors of {name} must have shapes {forms[name].shapes(site.rank)}; "
                f"got {shapes}"
            )
        scale, trained = scales.of(forms[name].target, site.rank), site.low_rank.lora_scale
        if trained is None and not math.isclose(scale, site.scale):
            raise ValueError(
                f"{directory}: {name} has the scale {scale:g} there and {site.scale:g} in the "
                "model: register the site with the adapter's alpha"
            )
        key = keys.get(name)
        if key is not None and math.isclose(scale, key.scale):
            scale = key.scale
        dtype = site.lora_A.dtype
        A, B = (factor.to(dtype) for factor in forms[name].from_peft(own))
        new = torch.tensor([scale], dtype=dtype if trained is None else trained.dtype)
        if not all(tensor.isfinite().all() for tensor in (A, B, new)):
            raise ValueError(f"{directory}: {name} has values that {dtype} cannot hold")
        found[name] = (A, B, new, key)
    return found


def _form(name: str, site: Site) -> Form:
    banks = bank_names(site.module)
    return form_of(name, site.module, site.tensor_name, tuple(site.weight.shape), banks)


def _keys(metadata: dict[str, str], file: Path) -> dict[str, _Key]:
    try:
        keys = {name: _Key(**key) for name, key in json.loads(metadata.get("relora", "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r:.300}") from None
    for name, key in keys.items():
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (key.seed, key.restart))
        if not whole or not isinstance(key.scale, float) or not math.isfinite(key.scale):
            raise ValueError(f"{file} is damaged: its entry for {name!r} is {key}")
    return keys

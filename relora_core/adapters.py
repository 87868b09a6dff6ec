"""The factors of the cycle that is under way, as files that PEFT reads and writes."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from relora_core._sharding import copy_from_full_, full
from relora_core.sites import Site, sites_of

_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def save_adapters(
    model: nn.Module, directory: str | os.PathLike[str], *, base: str | None = None
) -> Path:
    """Write A and B of every site as an adapter of PEFT's, which `PeftModel.from_pretrained` reads.

    It belongs to the model's W as they are now, after so many merges: keep those with it
    (`base_state_dict`). What else is trained, such as biases and norms, is not in it. The seed and
    restart number of each site are kept beside the tensors, where PEFT does not look. Every rank
    must call it; sharded factors are gathered one at a time and rank 0 writes.

    Args:
        model: with low-rank sites on the weights of Linear, Embedding or Conv1d to Conv3d; not
            changed.
        directory: made if absent; `adapter_model.safetensors` and `adapter_config.json` in it are
            each replaced whole.
        base: name or path of the model that it belongs to, as PEFT's config notes it.

    Returns:
        The directory.

    Raises:
        ValueError: if there is no site, or one that PEFT's format has no place for. Nothing is
            written then.

    Example:
        >>> import tempfile
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> sorted(path.name for path in save_adapters(model, tempfile.mkdtemp()).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']

    Reference: https://github.com/huggingface/peft, LoRA's checkpoint format.
    """
    directory = Path(directory)
    sites = sites_of(model)
    forms = {name: _form(name, site) for name, site in sites}
    writes = not dist.is_initialized() or dist.get_rank() == 0
    tensors: dict[str, Tensor] = {}
    for name, site in sites:
        A, B = full(site.lora_A.detach()), full(site.lora_B.detach())
        if writes:
            tensors |= {
                f"{_PREFIX}{name}.{key}": tensor.cpu().clone(memory_format=torch.contiguous_format)
                for key, tensor in forms[name].to_peft(A, B).items()
            }
    config = _config(dict(sites), base)
    keys = {name: [site.low_rank.seed, site.restart] for name, site in sites}
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{_TENSORS}.partial"
        save_file(tensors, partial, metadata={"format": "pt", "relora": json.dumps(keys)})
        text = directory / f"{_CONFIG}.partial"
        text.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.replace(directory / _TENSORS)
        text.replace(directory / _CONFIG)
    return directory


def load_adapters(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Fill A and B of every site from an adapter of PEFT's, this library's or another's.

    The sites and the adapter must be the same, of the same rank and scale; a trained scale takes
    the adapter's. Where the adapter was written by `save_adapters`, the sites go on with its seeds
    and restart numbers, so that the next redraw is the one that would have come. Every rank must
    call it, and reads the files.

    Args:
        model: with low-rank sites, sharded or not.
        directory: of the adapter.

    Raises:
        ValueError: if a file is absent, damaged or no LoRA adapter, or does not fit the model.
            Nothing is changed then.

    Example:
        >>> import tempfile
        >>> from relora_core import add_low_rank_
        >>> model = add_low_rank_(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
        >>> load_adapters(model, save_adapters(model, tempfile.mkdtemp()))
    """
    directory = Path(directory)
    config = _read_config(directory / _CONFIG)
    tensors, keys = _read_tensors(directory / _TENSORS)
    sites = dict(sites_of(model))
    forms = {name: _form(name, site) for name, site in sites.items()}
    expected = {f"{_PREFIX}{name}.{key}" for name, form in forms.items() for key in form.keys}
    if expected != tensors.keys():
        absent, other = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise ValueError(
            f"{directory} does not fit the model: it lacks {absent[:3] or 'nothing'} and has "
            f"{other[:3] or 'nothing'} beside (of {len(absent)} and {len(other)})"
        )
    factors, scales = {}, {}
    for name, site in sites.items():
        own = {key: tensors[f"{_PREFIX}{name}.{key}"] for key in forms[name].keys}
        shapes = {key: tuple(t.shape) for key, t in forms[name].to_peft(*_meta(site)).items()}
        given = {key: tuple(tensor.shape) for key, tensor in own.items()}
        if given != shapes:
            raise ValueError(f"{directory}: {name} needs factors of shapes {shapes}; got {given}")
        factors[name] = forms[name].from_peft(own)
        scales[name] = _scale(config, name, site.rank)
        if site.low_rank.lora_scale is None and not math.isclose(scales[name], site.scale):
            raise ValueError(
                f"{directory}: {name} has the scale {scales[name]:g} there and {site.scale:g} in "
                "the model: register the site with that alpha"
            )
    with torch.no_grad():
        for name, site in sites.items():
            A, B = factors[name]
            copy_from_full_(site.lora_A, A.to(site.lora_A.dtype))
            copy_from_full_(site.lora_B, B.to(site.lora_B.dtype))
            if site.low_rank.lora_scale is not None:
                scale = torch.full((1,), scales[name], dtype=site.low_rank.lora_scale.dtype)
                copy_from_full_(site.low_rank.lora_scale, scale)
            if name in keys:
                site.low_rank.seed, site.low_rank.restart = keys[name]


@dataclass(frozen=True)
class _Form:
    """How PEFT keeps the factors of one kind of module.

    Args:
        keys: of its tensors.
        W: the shape of the weight.
        embeds: whether they lie as an embedding's, whose weight is the transpose of PEFT's product.
    """

    keys: tuple[str, str]
    W: tuple[int, ...]
    embeds: bool = False

    def to_peft(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        if self.embeds:
            return dict(zip(self.keys, (B.t(), A.t()), strict=True))
        ones = (1,) * (len(self.W) - 2)
        views = A.view(len(A), *self.W[1:]), B.view(*B.shape, *ones)
        return dict(zip(self.keys, views, strict=True))

    def from_peft(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (tensors[key] for key in self.keys)
        if self.embeds:
            return second.t(), first.t()
        return first.flatten(1), second.flatten(1)


def _form(name: str, site: Site) -> _Form:
    module, W = site.module, tuple(site.weight.shape)
    if site.tensor_name == "weight":
        if isinstance(module, nn.Embedding):
            return _Form(("lora_embedding_A", "lora_embedding_B"), W, embeds=True)
        whole = isinstance(module, _CONVOLUTIONS) and module.groups == 1
        if isinstance(module, nn.Linear) or whole:
            return _Form(("lora_A.weight", "lora_B.weight"), W)
    raise ValueError(
        f"{name}: PEFT's format holds adapters of the weight of Linear, Embedding and Conv1d to "
        f"Conv3d without groups; got {site.tensor_name} of {type(module).__name__}"
    )


def _meta(site: Site) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(site.lora_A.shape, device="meta"),
        torch.empty(site.lora_B.shape, device="meta"),
    )


def _config(sites: Mapping[str, Site], base: str | None) -> dict[str, Any]:
    ranks = {name: site.rank for name, site in sites.items()}
    alphas = {name: site.scale * site.rank for name, site in sites.items()}
    usual_rank, usual_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        # A list would also match modules whose names end alike.
        "target_modules": "|".join(re.escape(name) for name in sites),
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual_rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != usual_alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in config.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        scales = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        sound = all(isinstance(s, int | float) and math.isfinite(s) for s in scales)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no adapter's configuration: {error!r}") from None
    if config.get("peft_type") != "LORA" or not sound:
        raise ValueError(f"{file} is of no LoRA adapter: peft_type={config.get('peft_type')!r}")
    for option in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if config.get(option):
            raise ValueError(f"{file}: {option} has no meaning for a site W + s B A")
    return dict(config)


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    try:
        with safe_open(file, framework="pt") as found:
            metadata = found.metadata() or {}
            # safe_open is no mapping: it has keys() only.
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        keys = {
            str(name): (int(seed), int(restart))
            for name, (seed, restart) in json.loads(metadata.get("relora", "{}")).items()
        }
    except (
        OSError,
        SafetensorError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{file} is no adapter's tensors: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} is {tensor.dtype}, not floating point")
    return tensors, keys

"""PEFT's LoRA files: the tensors of one site, and the configuration of all."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from relora_core.files.whole import refuse_irregular

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# With one of these options an adapter is not W + s B A, or W is not the plain weight.
_OTHER = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# The errors that reading a foreign file can raise.
_MALFORMED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, re.error),
)
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Form:
    """How PEFT keeps the factors of one kind of module.

    Args:
        keys: the names of the two tensors, under `place`.
        place: the qualified name of the module.
        target: the name that PEFT's patterns are matched against; for a bank, its Parameter's name.
        W: the shape of the weight.
        kind: "linear", which includes convolutions; "embedding", whose weight is the transpose of
            PEFT's product; "bank"; or "transposed bank", whose matrices are `(in, out)`.
    """

    keys: tuple[str, str]
    place: str
    target: str
    W: tuple[int, ...]
    kind: Literal["linear", "embedding", "bank", "transposed bank"] = "linear"

    @property
    def is_bank(self) -> bool:
        """Whether PEFT targets this weight as a Parameter, by name (`target_parameters`)."""
        return self.kind in ("bank", "transposed bank")

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the two tensors."""
        if self.kind == "embedding":
            return (rank, self.W[0]), (self.W[1], rank)
        if self.is_bank:
            E, out, inner = self.W if self.kind == "bank" else (self.W[0], *self.W[:0:-1])
            return (rank * E, inner), (out, rank * E)
        return (rank, *self.W[1:]), (self.W[0], rank, *(1,) * (len(self.W) - 2))

    def to_peft(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return PEFT's two tensors for A and B, by name."""
        rank = A.shape[-2]
        if self.kind in ("embedding", "transposed bank"):
            A, B = B.mT, A.mT
        if self.is_bank:
            B = B.permute(1, 2, 0)  # the experts last
        pairs = zip(self.keys, (A, B), self.shapes(rank), strict=True)
        return {f"{self.place}.{key}": t.reshape(shape) for key, t, shape in pairs}

    def from_peft(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return A and B from PEFT's two tensors."""
        A, B = tensors
        if self.is_bank:
            E, rank = self.W[0], A.shape[0] // self.W[0]
            A, B = A.reshape(E, rank, -1), B.reshape(-1, rank, E).permute(2, 0, 1)
        else:
            A, B = A.flatten(1), B.flatten(1)
        return (B.mT, A.mT) if self.kind in ("embedding", "transposed bank") else (A, B)


def form_of(
    name: str, module: nn.Module, tensor_name: str, W: tuple[int, ...], banks: Sequence[str]
) -> Form:
    """Return the form of a site, or raise ValueError if PEFT's format cannot hold it.

    Args:
        name: the name of the site.
        module: the module that owns the site's tensor.
        tensor_name: the tensor's name in the module.
        W: the weight's shape.
        banks: the names of the module's sites that are banks, in the order of its Parameters.
    """
    if tensor_name in banks and len(W) == 3 and W[0] > 1:
        place = name if tensor_name == "weight" else name.removesuffix(tensor_name)[:-1]
        # PEFT wraps the module once for each bank; the first bank's wrapper is the innermost.
        within = "base_layer." * (len(banks) - 1 - banks.index(tensor_name))
        keys = (f"{within}lora_A.weight", f"{within}lora_B.weight")
        if place:
            turned = getattr(module, "is_transposed", False)  # PEFT reads the same attribute
            return Form(
                keys, place, f"{place}.{tensor_name}", W, "transposed bank" if turned else "bank"
            )
    if name and tensor_name == "weight" and tensor_name not in banks:
        if isinstance(module, nn.Embedding):
            return Form(("lora_embedding_A", "lora_embedding_B"), name, name, W, "embedding")
        plain = isinstance(module, _CONVOLUTIONS) and (
            module.groups == 1 and module.padding_mode == "zeros" and set(module.dilation) == {1}
        )
        # nn.MultiheadAttention reads out_proj's weight itself and bypasses PEFT's wrapper.
        linear = isinstance(module, nn.Linear)
        if plain or (linear and not isinstance(module, NonDynamicallyQuantizableLinear)):
            return Form(("lora_A.weight", "lora_B.weight"), name, name, W)
    raise ValueError(
        f"{name or 'the model itself'}: a site in PEFT's format must be the weight of a Linear, "
        "Embedding or Conv1d to Conv3d (without groups or dilation, padded with zeros) or a bank "
        "of two matrices or more, inside a model; got "
        f"{tensor_name} of {type(module).__name__}"
    )


def configuration(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    base: str | None,
    banks: Collection[str],
) -> dict[str, Any]:
    """Return the contents of `adapter_config.json` for sites by name; some are `banks`."""
    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    usual_rank, usual_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    # PEFT reads the names as patterns that also match the end of longer names, so each is anchored.
    exact = {name: f"^{re.escape(name)}" for name in ranks}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": "|".join(re.escape(n) for n in ranks if n not in banks) or [],
        **({"target_parameters": sorted(banks)} if banks else {}),
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "rank_pattern": {exact[n]: rank for n, rank in ranks.items() if rank != usual_rank},
        "alpha_pattern": {exact[n]: alpha for n, alpha in alphas.items() if alpha != usual_alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


@dataclass(frozen=True)
class Scales:
    """The rule by which an adapter's configuration gives each module its scale.

    Args:
        alpha: the alpha where no pattern matches.
        patterns: alphas by regular expression; the first that matches applies.
        by_root: whether alpha is divided by the square root of the rank (rsLoRA).
    """

    alpha: float
    patterns: Mapping[re.Pattern[str], float]
    by_root: bool

    def of(self, name: str, rank: int) -> float:
        """Return the scale of one module."""
        alpha = next((a for p, a in self.patterns.items() if p.match(name)), self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_scales(file: Path) -> Scales:
    """Return the scales of `adapter_config.json`.

    Raises:
        ValueError: if the file is absent or damaged, or describes anything but W + s B A.
    """
    try:
        refuse_irregular(file)
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {config['peft_type']!r:.40}, not LORA")
        other = [option for option in _OTHER if config.get(option)]
        if config.get("init_lora_weights", True) not in _PLAIN_INITS:
            other.append("init_lora_weights")
        if other:
            raise ValueError(f"with {', '.join(other)} the adapter is not W + s B A")
        patterns = {
            _compiled(pattern): _finite(alpha)
            for pattern, alpha in (config.get("alpha_pattern") or {}).items()
        }
        return Scales(_finite(config["lora_alpha"]), patterns, bool(config.get("use_rslora")))
    except _MALFORMED as error:
        raise ValueError(f"{file} must be a LoRA adapter's configuration: {error!r:.300}") from None


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of `adapter_model.safetensors`, and its metadata.

    Raises:
        ValueError: if the file is absent or damaged, or a tensor is not finite floating point.
    """
    try:
        refuse_irregular(file)
        with safe_open(file, framework="pt") as found:
            # safe_open is not a mapping: it only has keys().
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
            metadata = dict(found.metadata() or {})
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"{file} must hold the tensors of an adapter: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} must be finite and floating point")
    return tensors, metadata


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return a module pattern as PEFT reads it; refuse one that could take forever to match.

    Python's engine backtracks over every choice in a pattern, so even a few choices multiply.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # escapes and sets are one character each
    repeats = len(re.findall(r"[*+]", plain))
    choices = len(re.findall(r"[|?]", plain))
    if len(pattern) > 1000 or repeats > 2 or choices > 8 or re.search(r"\)[*+?{]|\{|\(\?", plain):
        raise ValueError(
            "a pattern must have at most two * or +, at most eight | or ?, and none of them after "
            f"a group; got {pattern!r:.60}"
        )
    return re.compile(rf"(.*\.)?({pattern})$")


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"an alpha must be a number; got {value!r:.40}")
    if not math.isfinite(float(value)):
        raise ValueError(f"an alpha must be finite; got {value}")
    return float(value)

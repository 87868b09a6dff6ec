"""Sites in transformers' architectures: the function once registered, restarted and reloaded.

    python docs/architectures.py --out docs/results/architectures/architectures.jsonl

Each is built from the smallest sensible configuration, with random weights, and given the globs
that a user of it would write.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import relora_core as relora
from reference_trainer.bench import markdown

_TOKENS = torch.arange(24).view(2, 12) % 60 + 2
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_KV = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LAYERS = ["*.layers.*"]
_FUSED = ["*.self_attn.*_proj", "*.experts.*_proj"]
_VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@dataclass(frozen=True)
class Architecture:
    """A model of transformers, and the globs for it.

    Args:
        kind: of its configuration, `model_type`.
        options: of the configuration.
        targets: as of `add_low_rank_`.
        auto: the class that makes it.
        banks: whether its experts are fused.
        inputs: of one call.
    """

    kind: str
    options: dict[str, Any]
    targets: list[str] = field(default_factory=lambda: _LAYERS)
    auto: str = "AutoModelForCausalLM"
    banks: bool = False
    inputs: Callable[[], dict[str, Tensor]] = lambda: {"input_ids": _TOKENS}

    def model(self) -> nn.Module:
        """Return the plain model, the same each time."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.kind, **self.options)
        config.use_cache = False
        made: nn.Module = getattr(transformers, self.auto).from_config(config)
        return made.eval()


def _pixels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def _both() -> dict[str, Tensor]:
    return {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS}


def _clip() -> dict[str, Tensor]:
    return {"input_ids": _TOKENS, **_pixels()}


def _sound() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 16, 20, generator=generator)
    return {"input_features": features, "decoder_input_ids": _TOKENS}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}


def _llama_like(kind: str, **more: Any) -> Architecture:
    return Architecture(kind, {**_SMALL, **_KV, **more})


def _bert_like(kind: str, **more: Any) -> Architecture:
    options = {**_SMALL, "max_position_embeddings": 64, **more}
    return Architecture(kind, options, ["*.encoder.layer.*"], "AutoModelForMaskedLM")


ARCHITECTURES = [
    *(_llama_like(kind) for kind in ("llama", "mistral", "qwen2", "stablelm", "olmo", "olmo2")),
    *(_llama_like(kind, head_dim=8) for kind in ("qwen3", "gemma", "gemma2")),
    _llama_like("phi3", pad_token_id=0),
    _llama_like("cohere"),
    _llama_like("starcoder2"),
    _llama_like("granite"),
    Architecture("phi", _SMALL),
    Architecture("gpt2", _GPT2, ["*.h.*"]),
    Architecture("gptj", {**_GPT2, "rotary_dim": 4}, ["*.h.*"]),
    Architecture(
        "gpt_neo",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        ["*.h.*"],
    ),
    Architecture("gpt_neox", _SMALL),
    Architecture("gpt_bigcode", _GPT2, ["*.h.*"]),
    Architecture("codegen", {**_GPT2, "rotary_dim": 4, "n_ctx": 64}, ["*.h.*"]),
    Architecture("opt", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture(
        "bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ["*.h.*"]
    ),
    Architecture("falcon", _SMALL, ["*.h.*"]),
    Architecture(
        "mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}, ["*.blocks.*"]
    ),
    Architecture(
        "mamba",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        ["*.mixer.in_proj", "*.mixer.out_proj"],
    ),
    *(_bert_like(kind) for kind in ("bert", "roberta", "electra")),
    _bert_like("deberta-v2"),
    Architecture(
        "albert",
        {**_SMALL, "embedding_size": 16, "max_position_embeddings": 64},
        ["*.albert_layers.*"],
        "AutoModelForMaskedLM",
    ),
    Architecture(
        "distilbert",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        ["*.layer.*"],
        "AutoModelForMaskedLM",
    ),
    Architecture(
        "t5",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        ["*.SelfAttention.?", "*.EncDecAttention.?", "*.DenseReluDense.*"],
        "AutoModelForSeq2SeqLM",
        inputs=_both,
    ),
    Architecture(
        "bart",
        {
            "vocab_size": 64,
            "d_model": 32,
            **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        },
        auto="AutoModelForSeq2SeqLM",
        inputs=_both,
    ),
    Architecture(
        "whisper",
        {
            "vocab_size": 64,
            "d_model": 32,
            "num_mel_bins": 16,
            "max_source_positions": 10,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
            **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        },
        auto="AutoModelForSpeechSeq2Seq",
        inputs=_sound,
    ),
    *(
        Architecture(kind, _VISION, targets, "AutoModel", inputs=_pixels)
        for kind, targets in (
            ("vit", ["layers.*"]),
            ("deit", ["layers.*"]),
            ("dinov2", ["encoder.layer.*"]),
        )
    ),
    Architecture(
        "clip",
        {
            "projection_dim": 16,
            "text_config": {**_SMALL, "max_position_embeddings": 16},
            "vision_config": _VISION,
        },
        auto="AutoModel",
        inputs=_clip,
    ),
    Architecture(
        "wav2vec2",
        {
            **_SMALL,
            "conv_dim": [16, 16],
            "conv_kernel": [10, 3],
            "conv_stride": [5, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        ["encoder.layers.*"],
        "AutoModel",
        inputs=_wave,
    ),
    Architecture("mixtral", {**_SMALL, **_KV, "num_local_experts": 4}, _FUSED, banks=True),
    Architecture(
        "qwen3_moe",
        {**_SMALL, **_KV, **_EXPERTS, "head_dim": 8, "num_experts": 4},
        _FUSED,
        banks=True,
    ),
    Architecture(
        "qwen2_moe",
        {**_SMALL, **_KV, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
        [*_FUSED, "*.shared_expert.*"],
        banks=True,
    ),
    Architecture(
        "olmoe", {**_SMALL, **_KV, "num_experts": 4, "num_experts_per_tok": 2}, _FUSED, banks=True
    ),
    Architecture(
        "granitemoe",
        {**_SMALL, **_KV, "num_local_experts": 4, "num_experts_per_tok": 2},
        _FUSED,
        banks=True,
    ),
    Architecture(
        "jetmoe",
        {**_SMALL, **_KV, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        ["*.input_linear", "*.output_linear", "*.kv_proj"],
        banks=True,
    ),
    Architecture(
        "gpt_oss",
        {**_SMALL, **_KV, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        _FUSED,
        banks=True,
    ),
]


def look_at(one: Architecture) -> dict[str, Any]:
    """Return what became of one architecture."""
    inputs = one.inputs()
    model = one.model()
    plain = copy.deepcopy(model)
    relora.add_low_rank_(model, one.targets, rank=2, alpha=4, batch_dims=1 if one.banks else None)
    found = relora.summary(model)
    registered = _difference(model, plain, inputs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        _output(model, inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = relora.restart_(model, optimizer)
    restarted = _difference(model, before, inputs)
    for _, site in relora.low_rank_sites(model):  # or the export would be of W alone
        nn.init.normal_(site.lora_B, std=0.02)
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        relora.save_merged(model, directory)
        reloaded = _difference(type(plain).from_pretrained(directory).eval(), model, inputs)
    return {
        "architecture": one.kind,
        "class": type(plain).__name__,
        "targets": one.targets,
        "sites": _grouped((name, line.shape) for name, line in found.sites.items()),
        "site_entries": sum(line.entries for line in found.sites.values()),
        "whole_entries": sum(line.entries for line in found.whole.values()),
        "left": _grouped((name, found.whole[name].shape) for name in found.left),
        "at_registration": float(f"{registered:.1e}"),
        "at_restart": float(f"{restarted:.1e}"),
        "reloaded": float(f"{reloaded:.1e}"),
        "idle": sorted({_pattern(name) for name in report.idle}),
        "warnings": [str(one.message) for one in said if "low-rank" in str(one.message)],
    }


def table(records: Iterable[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    header = ["architecture", "targets", "what became sites", "large matrices left whole"]
    header += ["at registration", "at a restart", "reloaded"]
    rows = []
    for record in records:
        figures = (record[key] for key in ("at_registration", "at_restart", "reloaded"))
        rows.append(
            [
                record["architecture"],
                ", ".join(f"`{glob}`" for glob in record["targets"]),
                ", ".join(_short(name) for name in record["sites"]),
                ", ".join(_short(name) for name in record["left"]) or "-",
                *(f"{figure:.0e}" if figure else "0" for figure in figures),
            ]
        )
    return markdown.table(header, rows)


def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what the model gives, logits if there are, as one vector."""
    torch.manual_seed(2)
    given = model(**inputs)
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(given[name] for name in names if name in given).flatten()


@torch.no_grad()
def _difference(one: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Return the largest difference between two outputs, relative to the largest entry."""
    a, b = _output(one, inputs), _output(other, inputs)
    return float((a - b).abs().max() / b.abs().max())


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _grouped(entries: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, list[int]]:
    return {_pattern(name): list(shape) for name, shape in entries}


def _short(name: str) -> str:
    """Return what tells a site from its neighbours: the part behind the block's number."""
    return f"`{name.rpartition('*.')[2]}`"


def main() -> None:
    """Look at all of them, or at some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = [one.kind for one in ARCHITECTURES]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="KIND")
    parser.add_argument("--out", type=Path, help="JSON lines to write")
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "seed": 0}
    records: list[dict[str, Any]] = []
    for number, one in enumerate(ARCHITECTURES, 1):
        if one.kind in args.only:
            sys.stderr.write(f"{number} of {len(ARCHITECTURES)}: {one.kind}\n")
            records.append(look_at(one))
    sys.stdout.write(table(records) + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record) for record in (versions, *records)]
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Small Llamas as Hugging Face publishes them."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.runs import TINY

LONG = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
KINDS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LONG},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "bf16 in shards": {},
}


def tiny_arguments() -> list[str]:
    """Return the arguments of the tiny run without those of its shape."""
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    return [part for pair in pairs if not pair[0].startswith("--model.") for part in pair]


def publish(directory: Path, kind: str) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **KINDS[kind]})).eval()
    if kind == "bf16 in shards":
        model = model.bfloat16()
        model.save_pretrained(directory, max_shard_size="20KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
        return model.float()
    model.save_pretrained(directory)
    return model

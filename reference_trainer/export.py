"""The merged model as Hugging Face's `LlamaForCausalLM` reads it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import relora_core as relora
from reference_trainer.checkpoint.find import find_checkpoint
from reference_trainer.checkpoint.format import read_position
from reference_trainer.config import Config
from reference_trainer.data.index import Index, read_index
from reference_trainer.data.tokenizer import bytes_as_file
from reference_trainer.distributed import World
from reference_trainer.files import write_whole
from reference_trainer.model.llama import Llama, LlamaShape
from reference_trainer.phases import phases
from reference_trainer.pretrained import shape_of
from reference_trainer.train_state import build_state, fill_


def export(config: Config, world: World) -> Path:
    """Write the newest checkpoint's merged model to the run's `export/` and return its path.

    Every process must call this.

    Raises:
        SharedError: if the run has no complete checkpoint, or a file cannot be written.
    """
    source = find_checkpoint(config.checkpoints, world)
    if source is None:
        world.refuse(f"{config.directory} has no complete checkpoint to export")
    index = read_index(config.data_directory)
    shape = shape_of(config, index.vocab_size)
    name = read_position(source).phase
    phase = next(phase for phase in phases(config) if phase.name == name)
    # Sharded bases keep fp32, and need the least memory.
    config = replace(
        config,
        parallel=replace(config.parallel, layout="shard"),
        relora=replace(config.relora, base="keep"),
    )
    state = build_state(config, phase, shape, world, merged=False)
    fill_(state, config, source, world)
    return write_export(state.model, config, index, world)


def write_export(model: Llama, config: Config, index: Index, world: World) -> Path:
    """Write a model's merged weights to the run's `export/` and return its path.

    Every process must call this.

    Raises:
        SharedError: if a file cannot be written.
    """
    target = config.directory / "export"
    failed: OSError | None = None
    try:
        relora.save_merged(model, target)
    except OSError as error:  # only the first process writes; all must learn of its error
        failed = error

    def complete() -> None:
        if failed is not None:
            raise failed
        described = hugging_face_config(model.shape, index.end, config.batch.length)
        write_whole(target / "config.json", json.dumps(described, indent=2))
        own = config.data_directory / "tokenizer.json"
        text = own.read_text(encoding="utf-8") if own.is_file() else bytes_as_file()
        write_whole(target / "tokenizer.json", text)
        fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_whole(target / "tokenizer_config.json", json.dumps(fast, indent=2))

    world.on_first(complete, f"could not write {target}")
    return target


def hugging_face_config(shape: LlamaShape, end: int, length: int) -> dict[str, object]:
    """Return the `config.json` of a `LlamaForCausalLM` of this shape."""
    sizes, scaling = asdict(shape), None
    if shape.rope_scaling is not None:
        scaling = asdict(shape.rope_scaling)
        scaling["rope_type"] = scaling.pop("kind")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": shape.head_size,
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": length,
        "rms_norm_eps": sizes["norm_eps"],
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "dtype": "float32",
        "torch_dtype": "float32",
    }

"""A Hugging Face Llama to start from: its shape, and its weights as safetensors."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reference_trainer.checksums import read_json
from reference_trainer.config import Config
from reference_trainer.errors import DamagedError, UserError, one_line
from reference_trainer.model.llama import Llama, LlamaShape
from reference_trainer.parallelize import copy_whole_
from reference_trainer.validated import MismatchError, validated

_COPY = "pretrained.json"
_DTYPES = {"F64", "F32", "BF16", "F16"}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Features that this Llama lacks must be off; a feature that a file leaves out counts as off.
_OFF = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "hidden_act": "silu"}


def shape_of(config: Config, vocab_size: int) -> LlamaShape:
    """Return the shape of the run's model, from `model.weights` or from the model's options.

    Args:
        config: the run's configuration. A run that exists already has its own copy of the
            config.json in `model.weights`.
        vocab_size: the number of ids of the run's tokenizer.

    Raises:
        UserError: if the numbers do not fit together, or `model.weights` is not a Llama that this
            trainer supports.
    """
    if config.model.weights is None:
        return config.model.shape(vocab_size)
    copy, weights = config.directory / _COPY, Path(config.model.weights)
    shape = read_shape(copy if copy.is_file() else weights / "config.json")
    bytes_of_others = config.data.tokenizer == "bytes" and shape.vocab_size != vocab_size
    if vocab_size > shape.vocab_size or (bytes_of_others and not config.data.prepared):
        raise UserError(
            f"the tokenizer has {vocab_size} ids, but model.weights has {shape.vocab_size}: give "
            f"the model's own as data.tokenizer (such as {weights / 'tokenizer.json'})"
        )
    return shape


def read_shape(file: Path) -> LlamaShape:
    """Return the shape in a `config.json` of a `LlamaForCausalLM`.

    Raises:
        UserError: if the file is damaged, of another model, or asks for a feature that this Llama
            lacks.
    """
    if not file.is_file():
        raise UserError(f"model.weights must be a directory with a config.json; {file} is absent")
    found = read_json(file)
    if found.get("model_type") != "llama":
        raise UserError(f"{file}: model_type must be 'llama'; got {found.get('model_type')!r:.40}")
    for key, off in _OFF.items():
        if found.get(key, off) not in (off, None):
            raise UserError(f"{file}: {key} must be {off!r} here; got {found[key]!r:.40}")
    heads = found.get("num_attention_heads")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    fields = {
        "hidden_size": found.get("hidden_size"),
        "intermediate_size": found.get("intermediate_size"),
        "layers": found.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": found.get("num_key_value_heads") or heads,
        "vocab_size": found.get("vocab_size"),
        "norm_eps": found.get("rms_norm_eps", 1e-6),
    }
    try:
        theta = found.get("rope_theta", rope.get("rope_theta", 10_000.0))
        shape = validated(
            LlamaShape, {**fields, "rope_theta": theta, "rope_scaling": _scaling(rope, file)}
        )
    except (MismatchError, AttributeError) as error:
        raise DamagedError(f"{file} is damaged ({one_line(error)})") from None
    if found.get("head_dim") not in (None, shape.head_size):
        raise UserError(
            f"{file}: head_dim must be hidden_size / num_attention_heads = {shape.head_size}; got "
            f"{found['head_dim']!r:.40}"
        )
    return shape


def check_weights(directory: Path, shape: LlamaShape) -> None:
    """Check that `directory` holds every weight of a Llama of this shape, and that all are finite.

    Names, shapes and dtypes are checked first, from the files' headers alone.

    Raises:
        UserError: if a check fails; the message names the file or the weight.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Llama(shape).named_parameters()}
    with _Weights(directory) as weights:
        weights.check(expected)
        for name in expected:
            if not weights.read(name).isfinite().all():
                raise UserError(f"{name} of {directory} has numbers that are not finite")


def copy_config(directory: Path, run: Path) -> None:
    """Copy the `config.json` of `directory` into a run, which then no longer needs `directory`."""
    shutil.copyfile(directory / "config.json", run / _COPY)


@torch.no_grad()
def fill_from_(named: Mapping[str, Tensor], directory: Path) -> None:
    """Copy the weights in `directory` into the tensors of the same names, sharded or not."""
    with _Weights(directory) as weights:
        for name, tensor in named.items():
            copy_whole_(tensor, weights.read(name).to(tensor.dtype))


class _Weights(ExitStack):
    """The open safetensors files of a directory.

    A file stores tied weights once, under the embedding's name. The head then gets the embedding's
    weights, and the two are trained separately from there on.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._where: dict[str, Any] = {}
        try:
            for path in self._paths():
                file = self.enter_context(safe_open(path, framework="pt"))
                self._where |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            self.close()
            raise DamagedError(f"{directory} is damaged ({error})") from None
        except UserError:
            self.close()
            raise

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        known = {name for name in self._where if not name.endswith("rotary_emb.inv_freq")}
        if unknown := sorted(known - expected.keys()):
            raise UserError(
                f"{self._directory} has weights that this Llama does not have: {unknown[:3]}"
            )
        for name, shape in expected.items():
            found = self._slice(name)
            if tuple(found.get_shape()) != shape:
                raise UserError(
                    f"{name} of {self._directory} has the shape {tuple(found.get_shape())}; its "
                    f"config.json says {shape}"
                )
            if found.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{name} of {self._directory} must be one of {', '.join(sorted(_DTYPES))}; got "
                    f"{found.get_dtype()}"
                )

    def read(self, name: str) -> Tensor:
        whole: Tensor = self._slice(name)[:]
        return whole

    def _slice(self, name: str) -> Any:
        if name == _HEAD and name not in self._where:
            name = _EMBEDDING
        if name not in self._where:
            raise UserError(f"{self._directory} has no {name}")
        return self._where[name].get_slice(name)

    def _paths(self) -> Iterator[Path]:
        index = self._directory / "model.safetensors.index.json"
        if not index.is_file():
            single = self._directory / "model.safetensors"
            if not single.is_file():
                raise UserError(
                    f"{self._directory} holds no model.safetensors (pickled weights are not "
                    "loaded: convert them)"
                )
            yield single
            return
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise DamagedError(f"{index} is damaged (it does not map names to files)")
        for name in sorted(set(files.values())):
            if Path(name).name != name:
                raise DamagedError(f"{index} names {name!r:.100}, which is not a file beside it")
            yield self._directory / name


def _scaling(rope: Mapping[str, Any], file: Path) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{file}: rope_type must be default, linear or llama3; got {kind!r:.40}")
    names = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    return {"kind": kind, **{name: rope[name] for name in names & rope.keys()}}

"""A run that starts from a Llama of Hugging Face's starts from exactly its function."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from reference_trainer import options
from reference_trainer.distributed import open_world
from reference_trainer.main import main
from reference_trainer.model.llama import Llama
from reference_trainer.phases import phases
from reference_trainer.pretrained import fill_from_, read_shape
from reference_trainer.train_state import build_state, fill_
from tests.trainer.published import KINDS, publish, tiny_arguments
from tests.trainer.runs import RUN, records, train


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_transformers(tmp_path, kind):
    published = publish(tmp_path / "published", kind)
    shape = read_shape(tmp_path / "published/config.json")
    model = Llama(shape)
    fill_from_(dict(model.named_parameters()), tmp_path / "published")
    tokens = torch.randint(0, 256, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), published(tokens).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warm_start", [0, 2], ids=["relora at once", "after a warm start"])
def test_a_run_starts_from_it_and_then_does_without(tiny, tmp_path, kind, warm_start):
    published = publish(tmp_path / "published", kind)
    of_it = ("--model.weights", "published", "--steps", "8", "--checkpoint.keep", "9")
    train(*tiny_arguments(), *of_it, "--relora.warm_start", str(warm_start))
    first = records(RUN, "evaluation")[0]
    config = options.resolve(RUN / "config.yaml", {})
    with open_world(config.parallel) as world:
        state = build_state(config, phases(config)[0], read_shape(RUN / "pretrained.json"), world)
        fill_(state, config, None, world)
        tokens = torch.randint(0, 256, (2, 64))
        with torch.no_grad():
            found = state.model(tokens)
            torch.testing.assert_close(found, published(tokens).logits, atol=2e-5, rtol=1e-5)
    assert first["step"] == 0

    shutil.rmtree("published")
    (RUN / "export/model.safetensors").unlink()
    train("--resume")
    again = LlamaForCausalLM.from_pretrained(RUN / "export").eval()
    exported = Llama(read_shape(RUN / "export/config.json"))
    fill_from_(dict(exported.named_parameters()), RUN / "export")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, exported(tokens), atol=2e-5, rtol=1e-5)


def change(**fields):
    def spoil(directory: Path) -> None:
        file = directory / "config.json"
        config = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps(config))

    return spoil


def weights(spoil):
    def rewrite(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        spoil(tensors)
        save_file(tensors, directory / "model.safetensors")

    return rewrite


def shards(**weight_map):
    def write(directory: Path) -> None:
        index = {"weight_map": {"lm_head.weight": "model.safetensors", **weight_map}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


NORM = "model.norm.weight"
WRONG = {
    "another architecture": (
        change(model_type="mistral"),
        "model_type must be 'llama'; got 'mistral'",
    ),
    "biases": (change(attention_bias=True), "attention_bias must be False here; got True"),
    "an activation": (change(hidden_act="gelu"), "hidden_act must be 'silu' here; got 'gelu'"),
    "heads of their own size": (change(head_dim=16), "head_dim must be .* = 8; got 16"),
    "an unknown rope": (
        change(rope_parameters={"rope_type": "yarn"}),
        "rope_type must be default, lin",
    ),
    "a rope of no numbers": (change(rope_parameters={"rope_type": "llama3"}), "factor"),
    "a rope that is a list": (change(rope_parameters=[1]), "is damaged"),
    "no size": (change(hidden_size=None), "hidden_size"),
    "a huge size": (change(hidden_size=8 * 10**12), "hidden_size must lie in 1 .. 16777216"),
    "a large size": (
        change(hidden_size=2**24, head_dim=2**22),
        "has the shape .* its config.json says",
    ),
    "many layers": (change(num_hidden_layers=10**9), "layers must lie in 1 .. 4096"),
    "a small vocabulary": (
        change(vocab_size=100),
        "has 256 ids, but model.weights has 100",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    "pickled weights": (pickled, "pickled weights are not loaded"),
    "a weight too few": (weights(lambda t: t.pop(NORM)), f"has no {NORM}"),
    "a weight too many": (
        weights(lambda t: t.update(bias=t[NORM].clone())),
        "this Llama does not have: .'bias'",
    ),
    "integers": (
        weights(lambda t: t.update({NORM: t[NORM].int()})),
        f"{NORM} of .* must be one of .*; got I32",
    ),
    "not finite": (weights(lambda t: t[NORM].fill_(torch.nan)), f"{NORM} of .* not finite"),
    "another shape": (weights(lambda t: t.update({NORM: t[NORM][1:].clone()})), "shape .31,."),
    "a file elsewhere": (shards(x="../../secrets.safetensors"), "is not a file beside it"),
    "a file that is absent": (shards(x="absent.safetensors"), "absent.safetensors"),
    "no directory": (shutil.rmtree, "model.weights must be a directory with a config.json"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_before_anything(tiny, tmp_path, capsys, wrong):
    publish(tmp_path / "published", "plain")
    spoil, says = WRONG[wrong]
    spoil(tmp_path / "published")
    capsys.readouterr()
    assert main(["train", *tiny_arguments(), "--model.weights", "published"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert re.search(says, error), error
    assert not Path("runs").exists()


def test_a_shape_beside_it_is_refused(tiny, tmp_path, capsys):
    assert main(["train", *tiny, "--model.weights", "published"]) == 2
    said = capsys.readouterr().err
    assert "model sizes must not be given with model.weights, which has its own; got" in said
    assert "weights=published, hidden_size=32" in said

"""The Llama is Hugging Face's, and its presets are the paper's."""

import warnings

import pytest
import torch
from torch import nn

from reference_trainer.export import hugging_face_config
from reference_trainer.model.llama import PRESETS, Llama, LlamaShape, preset

# Total parameters in millions at a vocabulary of 32100, from the shapes in the paper's code.
TOTALS = {"60m": 58.2, "130m": 134.3, "250m": 247.5, "350m": 368.2, "1.3b": 1339.5}


@pytest.mark.parametrize("name", TOTALS)
def test_a_preset_has_the_paper_s_number_of_parameters(name):
    with torch.device("meta"):
        model = Llama(preset(name, vocab_size=32100))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(TOTALS[name], abs=0.1)


def test_every_preset_is_a_shape():
    assert [preset(name, vocab_size=256).hidden_size for name in PRESETS] == [
        PRESETS[name][0] for name in PRESETS
    ]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_and_loss_are_those_of_transformers(kv_heads):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = LlamaShape(32, 48, 2, 4, kv_heads, 61)
        theirs = LlamaForCausalLM(LlamaConfig(**hugging_face_config(shape, 0, 64))).eval()
    ours = Llama(shape)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    missing = theirs.load_state_dict(ours.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    tokens = torch.randint(0, 61, (3, 17))
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), logits, atol=1e-4, rtol=0)
        expected = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        torch.testing.assert_close(ours(tokens[:, :-1], tokens[:, 1:]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "multiple of 2 . heads"),
        ({"kv_heads": 3}, "kv_heads must divide heads"),
        ({"layers": 0}, "layers must lie in 1 .. 4096; got 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    numbers = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 4,
        "vocab_size": 61,
    }
    with pytest.raises(ValueError, match=message):
        LlamaShape(**{**numbers, **change})

"""The formulas say what torch's counter counts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.bench.arms import ARMS
from reference_trainer.bench.workloads import subjects
from reference_trainer.flops import counted_flops, linear_flops, step_flops
from reference_trainer.model.llama import PRESETS, LlamaShape, preset

FORMS = {
    "full rank": "full",
    "two paths": "two-paths",
    "merged": "merged",
    "dense": "dense",
}


def counted(arm, subject, rank):
    work = subject.on_meta(lambda module: ARMS[arm](module, rank))
    return counted_flops(work.backward)


@pytest.mark.parametrize("form", FORMS)
@given(out=st.integers(1, 40), inner=st.integers(1, 40), tokens=st.integers(1, 40), data=st.data())
def test_a_linear_s(form, out, inner, tokens, data):
    rank = data.draw(st.integers(1, min(out, inner)))
    shape = LlamaShape(inner * 2, out, 1, 1, 1, 5)
    (linear, *_) = subjects("linear", shape, dtype="fp32", sequences=1, length=tokens)
    m, n = linear.matrix
    expected = linear_flops(form, tokens=tokens, out=m, inner=n, rank=rank)
    assert counted(FORMS[form], linear, rank) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_whole_step_s(form, name):
    shape = preset(name, vocab_size=1000)
    shape = replace(shape, layers=min(shape.layers, 8))  # all of 1.3b's are counted below
    (model,) = subjects("model", shape, dtype="fp32", sequences=2, length=32)
    expected = step_flops(form, shape, sequences=2, length=32, rank=16)
    assert counted(FORMS[form], model, 16) == expected


@pytest.mark.parametrize("arm", ["plain", "peft"])
def test_what_others_write_costs_as_many_as_two_paths(arm):
    pytest.importorskip("peft") if arm == "peft" else None
    shape = preset("9m", vocab_size=100)
    (model,) = subjects("model", shape, dtype="fp32", sequences=2, length=8)
    assert counted(arm, model, 4) == counted("two-paths", model, 4)


def test_a_step_of_1_3b_at_sequence_1024_costs_0_79_of_full_rank():
    shape, sizes = preset("1.3b", vocab_size=32_000), {"sequences": 4, "length": 1024}
    (model,) = subjects("model", shape, dtype="fp32", **sizes)
    arms = ("full", "two-paths", "ours", "dense")
    full, two_paths, ours, dense = (counted(arm, model, 128) for arm in arms)
    assert full == step_flops("full rank", shape, rank=128, **sizes)
    assert two_paths == step_flops("two paths", shape, rank=128, **sizes)
    assert ours <= two_paths <= 0.79 * full
    assert dense / full >= 1.0


def test_causal_attention_counts_half():
    q = torch.empty(6, 8, 4, device="meta")
    assert counted_flops(lambda: q @ q.mT) == 6 * 8 * 8 * 4

"""The output head is a linear layer; only where its logits lie differs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import relora_core as relora
from reference_trainer.model.head import Head
from reference_trainer.model.loss import CrossEntropy


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_logits_and_gradients_are_a_linear_s(tokens, inner, vocabulary, dtype):
    head = Head(inner, vocabulary).to(getattr(torch, dtype))
    torch.nn.init.normal_(head.weight)
    x = torch.randn(tokens, inner, dtype=head.weight.dtype, requires_grad=True)
    y = torch.randint(0, vocabulary, (tokens,))
    found = []
    for run in (head, lambda x: F.linear(x, head.weight)):
        logits = run(x)
        assert logits.shape == (tokens, vocabulary)
        kept = logits.detach().clone()
        CrossEntropy()(logits, y, divisor=tokens).backward()
        found.append((kept, x.grad, head.weight.grad))
        x.grad = head.weight.grad = None
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("vocabulary", [5, 8, 12, 32_100])
def test_rows_of_logits_and_of_their_gradient_begin_at_whole_words(vocabulary):
    head, seen = Head(4, vocabulary), []
    logits = head(torch.randn(3, 4))
    logits.register_hook(lambda g: seen.append(g.stride()))
    CrossEntropy()(logits, torch.zeros(3, dtype=torch.long), divisor=3.0).backward()
    for strides in (logits.stride(), *seen):
        assert strides[0] % 8 == 0
        assert strides[1] == 1
    assert len(seen) == 1


def test_a_low_rank_head_is_what_a_low_rank_linear_is():
    torch.manual_seed(0)
    head, linear = Head(6, 10), torch.nn.Linear(6, 10, bias=False)
    linear.load_state_dict(head.state_dict())
    x = torch.randn(3, 6)
    outputs = []
    for module in (head, linear):
        whole = torch.nn.Sequential(module)
        relora.add_low_rank_(whole, "0", rank=2)
        torch.nn.init.ones_(module.parametrizations.weight[0].lora_B)
        outputs.append(whole(x))
    assert torch.equal(*outputs)


def test_whoever_looks_on_finds_a_linear():
    """Autocast, transforms, a compiler and other shapes, for which aligned rows are not made."""
    torch.manual_seed(0)
    head = Head(6, 10)
    linear = torch.nn.Linear(6, 10, bias=False)
    linear.load_state_dict(head.state_dict())
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert head(given).dtype == torch.bfloat16
            assert torch.equal(head(given), linear(given))
    assert torch.equal(head(x.view(2, 2, 6)), linear(x.view(2, 2, 6)))
    assert torch.equal(torch.vmap(head)(x.view(2, 2, 6)), torch.vmap(linear)(x.view(2, 2, 6)))
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x))


def test_second_derivatives_go_through():
    head = Head(3, 5).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(head, x)

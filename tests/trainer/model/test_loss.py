"""The loss in chunks is torch's cross-entropy, and its gradient takes the place of the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.model import loss as module
from reference_trainer.model.loss import IGNORED, CrossEntropy


def drawn(tokens, vocabulary, dtype, ignored):
    generator = torch.Generator().manual_seed(tokens * 100 + vocabulary)
    z = torch.randn(tokens, vocabulary, generator=generator).mul(3).to(dtype)
    y = torch.randint(0, vocabulary, (tokens,), generator=generator)
    y[: min(ignored, tokens - 1)] = IGNORED
    return z, y


def both(z, y, divisor):
    """Return loss and gradient, ours and torch's in float64."""
    ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    logits = ours * 1  # what a head has just made
    loss = CrossEntropy()(logits, y, divisor=divisor)
    (loss / 4).backward()
    expected = F.cross_entropy(exact, y, reduction="sum", ignore_index=IGNORED) / divisor
    (expected / 4).backward()
    return loss.detach(), ours.grad, expected.detach(), exact.grad


@pytest.fixture(params=[2**24, 20], ids=["one chunk", "chunks of few tokens"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 2), (7, 5), (13, 40)])
@pytest.mark.parametrize("ignored", [0, 3])
def test_value_and_gradient_are_those_of_all_logits_in_float64(dtype, tokens, vocabulary, ignored):
    z, y = drawn(tokens, vocabulary, dtype, ignored)
    loss, gradient, expected, exact = both(z, y, tokens)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # rounded once, and scaled
    torch.testing.assert_close(gradient.double(), exact, rtol=tolerance, atol=1e-8)


@given(st.integers(1, 50), st.integers(1, 30))
def test_chunks_change_nothing(tokens, entries):
    z, y = drawn(tokens, 11, torch.float32, 2)
    whole = both(z, y, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ENTRIES", entries)
        parts = both(z, y, 1)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_no_other_tensor_of_the_logits_size_is_made(monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", 2**10)
    z, y = drawn(64, 128, torch.bfloat16, 0)
    logits = z.requires_grad_() * 1
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() != logits.data_ptr():
                sizes.append(out.numel())
            return out

    with Watch():
        loss = CrossEntropy()(logits, y, divisor=64)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert gradient.data_ptr() == logits.data_ptr()
    own = [size for size in sizes if size >= logits.numel() // 2]
    assert not own


def test_without_gradients_the_logits_stay_as_they_are():
    z, y = drawn(7, 5, torch.float32, 0)
    before = z.clone()
    loss = CrossEntropy()(z, y, divisor=7)
    assert torch.equal(z, before)
    torch.testing.assert_close(loss, F.cross_entropy(z, y))


def test_a_second_backward_is_refused():
    z, y = drawn(7, 5, torch.float32, 0)
    loss = CrossEntropy()(z.requires_grad_() * 1, y, divisor=7)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient of this loss has been used"):
        loss.backward()


def test_a_target_that_is_no_id_is_an_error():
    with pytest.raises((IndexError, RuntimeError)):
        CrossEntropy()(torch.zeros(2, 4), torch.tensor([-1, 1]), divisor=2)


def test_what_is_ignored_may_be_infinite():
    z = torch.tensor([[-float("inf"), 0.0], [0.0, 0.0]])
    loss = CrossEntropy()(z, torch.tensor([IGNORED, 0]), divisor=1)
    torch.testing.assert_close(loss, torch.tensor(0.6931472))

"""Pruning by magnitude: exact in count, silent about nothing."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import relora_core as relora
from relora_core.optim import radix_select as selection
from tests.reference import dropped, mask_by_sorting

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ties = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, math.inf, -math.inf])
values = st.lists(ties | st.floats(-4, 4, width=16), max_size=40)


@given(values=values, ratio=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_equals_sorting_and_keeps_the_survivors_bits(values, ratio, dtype):
    tensor = torch.tensor(values, dtype=dtype)
    before = tensor.clone()
    pruned = relora.magnitude_prune_(tensor, ratio=ratio)
    assert pruned is tensor
    expected = before.masked_fill(mask_by_sorting(before, ratio), 0.0)
    assert pruned.tolist() == expected.tolist()
    kept = pruned != 0
    assert torch.equal(pruned[kept], before[kept])


KINDS = {
    "normal": lambda r, n: r.standard_normal(n),
    "few values": lambda r, n: r.choice([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf], n),
    "one value": lambda r, n: np.full(n, r.choice([0.0, 3.0, -math.inf])),
    "far apart": lambda r, n: r.standard_normal(n) * 10.0 ** r.integers(-45, 30, n),
    "mostly zero": lambda r, n: r.standard_normal(n) * (r.random(n) < 0.1),
}
VIEWS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.view(2, -1).t(),
    "every third": lambda t: t[::3],
    "a part": lambda t: t[1:-1],
    "spread": lambda t: t.view(2, -1)[:, ::2],
}


@settings(max_examples=20 * settings.default.max_examples)
@given(
    seed=st.integers(0, 2**32 - 1),
    entries=st.integers(1, 100).map(lambda half: 2 * half),
    ratio=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(list(KINDS)),
    view=st.sampled_from(list(VIEWS)),
)
def test_equals_numpy_whatever_the_values_and_the_memory(seed, entries, ratio, dtype, kind, view):
    values = KINDS[kind](np.random.default_rng(seed), entries)
    tensor = VIEWS[view](torch.from_numpy(values).to(dtype))
    before = tensor.double().numpy().copy()
    relora.magnitude_prune_(tensor, ratio=ratio)
    order = np.argsort(np.abs(before).ravel(), kind="stable")
    before.ravel()[order[: dropped(before.size, ratio)]] = 0.0
    after = tensor.double().numpy()
    assert np.array_equal(after, before)
    assert np.array_equal(np.signbit(after)[after != 0], np.signbit(before)[before != 0])


@given(st.integers(0, 300), st.floats(0, 1), st.sampled_from(DTYPES))
def test_the_count_is_exact_even_when_all_are_equal(entries, ratio, dtype):
    pruned = relora.magnitude_prune_(torch.ones(entries, dtype=dtype), ratio=ratio)
    assert int((pruned == 0).sum()) == dropped(entries, ratio)


def test_eight_bit_floats_are_pruned_too():
    tensor = torch.tensor([3.0, -1.0, 2.0, -4.0, 1.0]).to(torch.float8_e4m3fn)
    assert relora.magnitude_prune_(tensor, ratio=0.5).float().tolist() == [3, 0, 0, -4, 0]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(8, 1024), (1023,), (17, 5, 3)])
def test_the_mask_is_that_of_the_authors_quantile(shape, ratio):
    tensor = torch.randn(shape)
    threshold = torch.quantile(tensor.abs(), ratio)
    expected = torch.where(tensor.abs() > threshold, tensor, 0)
    assert torch.equal(relora.magnitude_prune_(tensor, ratio=ratio), expected)


@pytest.mark.parametrize("select", [selection._by_counting, selection._by_sorting])
@given(data=st.data())
def test_both_ways_of_selecting_equal_sorting(select, data):
    entries = data.draw(st.lists(ties | st.floats(-4, 4, width=16), min_size=1, max_size=120))
    tensor = torch.tensor(entries, dtype=data.draw(st.sampled_from(DTYPES)))
    count = data.draw(st.integers(1, len(entries)))
    magnitudes = tensor.abs().tolist()
    order = sorted(range(len(entries)), key=lambda i: (magnitudes[i], i))
    with mock.patch.object(selection, "_CHUNK", data.draw(st.integers(1, 50))):
        mask = select(tensor, count)
    assert mask.nonzero().squeeze(1).tolist() == sorted(order[:count])


@pytest.mark.parametrize("on_cpu", [True, False])
@given(data=st.data())
def test_many_tensors_at_once_are_each_selected_as_if_alone(on_cpu, data):
    """The way of shards, here of one process: by counting, and by sorting as on a device."""
    dtype = data.draw(st.sampled_from(DTYPES))
    entries = st.lists(ties | st.floats(-4, 4, width=16), min_size=1, max_size=60)
    tensors = [torch.tensor(data.draw(entries), dtype=dtype) for _ in range(3)]
    counts = [data.draw(st.integers(1, len(tensor))) for tensor in tensors]
    together = selection._of_shards(tensors, counts, on_cpu=on_cpu)
    for tensor, count, mask in zip(tensors, counts, together, strict=True):
        assert torch.equal(mask, selection._by_sorting(tensor, count))


@given(st.integers(0, 300), st.floats(0, 1), st.integers(0, 5))
def test_random_pruning_zeroes_exactly_as_many_and_by_its_seed(entries, ratio, seed):
    pruned = relora.random_prune_(torch.ones(entries), ratio=ratio, seed=seed)
    assert int((pruned == 0).sum()) == dropped(entries, ratio)
    assert torch.equal(relora.random_prune_(torch.ones(entries), ratio=ratio, seed=seed), pruned)


def test_random_pruning_prefers_no_entry():
    kept = sum(relora.random_prune_(torch.ones(10), ratio=0.5, seed=s) for s in range(4000)) / 4000
    torch.testing.assert_close(kept, torch.full((10,), 0.5), atol=0.04, rtol=0.0)


def test_views_and_zero_dimensions_are_pruned_in_place():
    base = torch.arange(1.0, 13.0).view(3, 4)
    relora.magnitude_prune_(base.t()[1:], ratio=0.5)  # 2..4, 6..8, 10..12: five of nine go
    assert base.tolist() == [[1, 0, 0, 0], [5, 0, 0, 8], [9, 10, 11, 12]]
    assert relora.magnitude_prune_(torch.tensor(3.0), ratio=0.5).item() == 0


def test_more_entries_than_torch_quantile_takes():
    tensor = torch.randn(2**25 + 1)
    before = tensor.clone()
    relora.magnitude_prune_(tensor, ratio=0.5)
    assert int((tensor == 0).sum()) == 2**24 + 1
    kept = tensor != 0
    assert before.abs()[~kept].max() <= before.abs()[kept].min()
    assert torch.equal(tensor[kept], before[kept])


@pytest.mark.parametrize(
    ("tensor", "ratio", "error", "message"),
    [
        (torch.ones(3), 1.5, ValueError, "ratio must be between 0 and 1; got 1.5"),
        (torch.ones(3), math.nan, ValueError, "ratio must be between"),
        (torch.tensor([1.0, math.nan]), 0.5, ValueError, "must hold no NaN"),
        (torch.tensor([1, 2], dtype=torch.uint8), 0.5, TypeError, "must be floating point"),
    ],
)
def test_a_refused_call_changes_nothing(tensor, ratio, error, message):
    before = tensor.clone()
    with pytest.raises(error, match=message):
        relora.magnitude_prune_(tensor, ratio=ratio)
    torch.testing.assert_close(tensor, before, equal_nan=True)

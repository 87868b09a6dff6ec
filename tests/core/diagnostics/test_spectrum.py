"""The three ranks of a matrix agree with their definitions, whatever the matrix."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relora_core import Spectrum


def made(values, m, n):
    """Return an m x n matrix of these singular values."""
    left = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return left[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ right[: len(values)]


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


class TestSpectrum:
    @given(shapes, st.data())
    def test_it_holds_the_singular_values_a_matrix_was_made_of(self, shape, data):
        positive = st.floats(0.01, 100)
        values = data.draw(st.lists(positive, min_size=1, max_size=min(shape)))
        spectrum = Spectrum.of(made(values, *shape))
        expected = sorted(values, reverse=True) + [0.0] * (min(shape) - len(values))
        assert spectrum.values.tolist() == pytest.approx(expected, abs=1e-11)
        assert spectrum.shape == shape
        assert spectrum.rank() == len(values)
        assert spectrum.stable_rank == pytest.approx(
            sum(v * v for v in values) / max(values) ** 2, rel=1e-9
        )
        shares = [v / sum(values) for v in values]
        expected = math.exp(-sum(p * math.log(p) for p in shares))
        assert spectrum.effective_rank == pytest.approx(expected, rel=1e-6)

    @given(shapes)
    def test_equal_singular_values_count_as_many_as_they_are_in_every_rank(self, shape):
        k = min(shape)
        spectrum = Spectrum.of(made([0.3] * k, *shape))
        assert spectrum.rank() == k
        assert spectrum.stable_rank == pytest.approx(k)
        assert spectrum.effective_rank == pytest.approx(k)

    @given(shapes)
    def test_a_zero_matrix_has_no_rank(self, shape):
        spectrum = Spectrum.of(torch.zeros(shape))
        assert (spectrum.rank(), spectrum.stable_rank, spectrum.effective_rank) == (0, 0.0, 0.0)

    def test_none_is_less_than_zero_matrices_too(self):
        spectrum = Spectrum(torch.zeros(0, dtype=torch.float64), (3, 4))
        assert (spectrum.rank(), spectrum.stable_rank, spectrum.effective_rank) == (0, 0.0, 0.0)

    def test_the_tolerance_is_a_share_of_the_largest(self):
        spectrum = Spectrum(torch.tensor([10.0, 1.0, 0.1]).double(), (3, 3))
        assert [spectrum.rank(t) for t in (0, 0.005, 0.05, 0.5)] == [3, 3, 2, 1]

    @pytest.mark.parametrize("tolerance", [-0.1, 1.0, math.nan])
    def test_another_tolerance_is_refused(self, tolerance):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            Spectrum.of(torch.eye(2)).rank(tolerance)

    def test_a_convolution_counts_as_the_matrix_it_is(self):
        weight = torch.randn(3, 2, 2, 2)
        expected = torch.linalg.svdvals(weight.view(3, 8).double())
        assert torch.equal(Spectrum.of(weight).values, expected)

    def test_rounding_of_fp32_is_no_direction(self):
        exact = made([1.0, 0.5], 64, 48)
        assert Spectrum.of(exact.float()).rank() == 2
        assert Spectrum.of(exact.float()).rank(0) > 2

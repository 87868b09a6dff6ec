"""A spectrum that is streamed over restarts is that of W_k - W_0, for any model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import relora_core as relora
from tests.reference import randomize_


class Twin:
    """W_0 kept, and an SVD of what has come to it since."""

    def __init__(self, model):
        self.model = model
        self.first = self.weights()

    def weights(self):
        sites = relora.low_rank_sites(self.model)
        return {name: site.merged().double().flatten(1) for name, site in sites}

    def values(self):
        now = self.weights()
        return {n: torch.linalg.svdvals(now[n] - first) for n, first in self.first.items()}


def assert_same_values(spectra, twin, within=1e-6):
    measured, expected = spectra.measure(), twin.values()
    assert measured.keys() == expected.keys()
    for name, values in expected.items():
        found = torch.zeros_like(values)
        found[: len(measured[name].values)] = measured[name].values
        assert (found - values).abs().max() <= within * max(1.0, values[0].item()), name


def mixed():
    return nn.Sequential(
        nn.Embedding(9, 5), nn.Linear(5, 7), nn.Unflatten(-1, (7, 1)), nn.Conv1d(7, 6, 3, padding=1)
    )


def sited(rank=2, dtype=torch.float64, **options):
    model = relora.add_low_rank_(mixed().to(dtype), "*", rank=rank, **options)
    return model, torch.optim.SGD(p for p in model.parameters() if p.requires_grad)


class TestUpdateSpectra:
    @given(st.integers(1, 5), st.integers(0, 6), st.booleans(), st.floats(0.25, 4))
    def test_it_is_the_spectrum_of_the_change_of_the_weights(self, rank, restarts, ends, alpha):
        model, optimizer = sited(rank, alpha=alpha)
        spectra, twin = relora.UpdateSpectra(model), Twin(model)
        for _ in range(restarts):
            randomize_(model)
            spectra.keep_()
            relora.restart_(model, optimizer)
        if ends:  # in the middle of a cycle, whose update counts
            randomize_(model)
        assert_same_values(spectra, twin)
        bound = rank * (restarts + ends)
        for spectrum in spectra.measure().values():
            assert spectrum.rank() == min(bound, *spectrum.shape)

    def test_a_kept_cycle_is_not_counted_twice_before_its_restart(self):
        model, _ = sited()
        spectra, twin = relora.UpdateSpectra(model), Twin(model)
        randomize_(model)
        before = spectra.measure()
        spectra.keep_()
        assert_same_values(spectra, twin)
        for name, spectrum in spectra.measure().items():
            assert torch.equal(spectrum.values, before[name].values)

    def test_a_scale_that_is_trained_counts_with_its_value_of_each_cycle(self):
        model, optimizer = sited(trainable_scale=True)
        spectra, twin = relora.UpdateSpectra(model), Twin(model)
        for scale in (0.5, 3.0):
            randomize_(model)
            for _, site in relora.low_rank_sites(model):
                nn.init.constant_(site.low_rank.scale, scale)
            spectra.keep_()
            relora.restart_(model, optimizer)
        assert_same_values(spectra, twin)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_says_what_was_meant_to_be_merged_and_not_what_a_narrow_weight_loses(self, dtype):
        model, optimizer = sited(dtype=dtype)
        spectra = relora.UpdateSpectra(model)
        total = {name: 0.0 for name, _ in relora.low_rank_sites(model)}
        for _ in range(2):
            randomize_(model)
            for name, site in relora.low_rank_sites(model):
                total[name] += site.lora_B.detach().double() @ site.lora_A.detach().double()
            spectra.keep_()
            relora.restart_(model, optimizer)
        for name, spectrum in spectra.measure().items():
            values = torch.linalg.svdvals(total[name])
            torch.testing.assert_close(
                spectrum.values, values[: len(spectrum.values)], atol=1e-6, rtol=0
            )
            assert spectrum.rank() == 4

    def test_what_is_kept_never_takes_more_than_the_directions_there_are(self):
        model, optimizer = sited(rank=2)
        spectra = relora.UpdateSpectra(model, "1")
        for restart in range(6):
            randomize_(model)
            spectra.keep_()
            relora.restart_(model, optimizer)
            state = spectra.state_dict()
            count = min(2 * (restart + 1), 5)
            assert state["1.lora_B"].shape == (7, count)
            assert state["1.lora_A"].shape == (count, 5)

    def test_only_those_that_are_named_are_followed(self):
        model, _ = sited()
        assert [*relora.UpdateSpectra(model, ["0", "3"]).measure()] == ["0", "3"]


class TestState:
    @given(st.integers(0, 4))
    def test_it_goes_on_from_its_state_as_if_it_had_not_stopped(self, restarts):
        model, optimizer = sited()
        spectra, twin = relora.UpdateSpectra(model), Twin(model)
        for _ in range(restarts):
            randomize_(model)
            spectra.keep_()
            relora.restart_(model, optimizer)
        again = relora.UpdateSpectra(model)
        again.load_state_dict({k: v.clone() for k, v in spectra.state_dict().items()})
        for _ in range(2):
            randomize_(model)
            again.keep_()
            relora.restart_(model, optimizer)
        assert_same_values(again, twin)

    @given(st.integers(0, 4))
    def test_there_is_room_for_what_a_checkpoint_fills_in_place(self, restarts):
        model, optimizer = sited()
        spectra = relora.UpdateSpectra(model)
        for _ in range(restarts):
            randomize_(model)
            spectra.keep_()
            relora.restart_(model, optimizer)
        expected = spectra.measure()
        again = relora.UpdateSpectra(model)
        again.reserve_(restarts)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in spectra.state_dict().items()
        }
        for name, tensor in again.state_dict().items():
            tensor.copy_(spectra.state_dict()[name])
        for name, spectrum in again.measure().items():
            assert torch.equal(spectrum.values, expected[name].values)

    def test_one_that_was_given_out_stays(self):
        model, optimizer = sited()
        spectra = relora.UpdateSpectra(model)
        randomize_(model)
        spectra.keep_()
        given = spectra.state_dict()
        before = {name: tensor.clone() for name, tensor in given.items()}
        relora.restart_(model, optimizer)
        randomize_(model)
        spectra.keep_()
        for name, tensor in given.items():
            assert torch.equal(tensor, before[name])

    @pytest.mark.parametrize("spoil", ["more", "fewer", "shape"])
    def test_a_state_of_other_sites_is_refused_and_nothing_is_taken(self, spoil):
        model, _ = sited()
        spectra = relora.UpdateSpectra(model)
        randomize_(model)
        spectra.keep_()
        state = {k: v + 1 for k, v in spectra.state_dict().items()}
        if spoil == "more":
            state["other.lora_A"] = state["0.lora_A"]
        elif spoil == "fewer":
            del state["0.lora_A"]
        else:
            state["0.lora_A"] = state["0.lora_A"][:, 1:]
        before = {k: v.clone() for k, v in spectra.state_dict().items()}
        with pytest.raises(ValueError, match=r"0\.lora_A|other"):
            spectra.load_state_dict(state)
        for name, tensor in spectra.state_dict().items():
            assert torch.equal(tensor, before[name])


class TestRefusals:
    def test_a_cycle_is_kept_once(self):
        model, _ = sited()
        spectra = relora.UpdateSpectra(model)
        spectra.keep_()
        with pytest.raises(ValueError, match="cycle 0 is kept already"):
            spectra.keep_()

    def test_a_restart_that_went_by_is_noticed(self):
        model, optimizer = sited()
        spectra = relora.UpdateSpectra(model)
        relora.restart_(model, optimizer)
        for method in (spectra.keep_, spectra.measure):
            with pytest.raises(
                ValueError, match="is in cycle 1, and the updates of the cycles before 0"
            ):
                method()

    def test_a_factor_that_is_not_finite_is_refused_and_nothing_is_kept(self):
        model, _ = sited()
        spectra = relora.UpdateSpectra(model)
        randomize_(model)
        next(relora.low_rank_sites(model))[1].lora_B.data[0, 0] = torch.inf
        with pytest.raises(ValueError, match="not finite"):
            spectra.keep_()
        assert not any("lora" in name for name in spectra.state_dict())
        assert spectra.state_dict()["0.restart"] == 0

    def test_a_factor_that_is_not_finite_has_no_spectrum(self):
        for rank in (1, 2):
            model, _ = sited(rank)
            spectra = relora.UpdateSpectra(model)
            randomize_(model)
            next(relora.low_rank_sites(model))[1].lora_B.data[0, 0] = torch.nan
            with pytest.raises(ValueError, match="0: the update is not finite"):
                spectra.measure()

    def test_no_target_at_all_is_refused(self):
        model, _ = sited()
        with pytest.raises(ValueError, match="targets is empty"):
            relora.UpdateSpectra(model, [])

    def test_a_target_that_matches_nothing_is_refused(self):
        model, _ = sited()
        with pytest.raises(ValueError, match="'head' matches no low-rank site"):
            relora.UpdateSpectra(model, "head")

    def test_a_model_without_sites_is_refused(self):
        with pytest.raises(ValueError, match="no low-rank site"):
            relora.UpdateSpectra(mixed())

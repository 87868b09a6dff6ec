"""A W in two halves: bfloat16 to compute with, and the bits below it, which no merge loses."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import relora_core as relora
from relora_core.low_rank.low_bits import join, split
from tests.core.models import TARGETS, Model
from tests.reference import randomize_


def of_bits(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


# Any number; and often one whose lower half decides how it is rounded.
LOWER = st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
BITS = st.integers(0, 2**32 - 1) | st.builds(lambda a, b: a << 16 | b, st.integers(0, 65535), LOWER)


class TestHalves:
    @given(bits=st.lists(BITS, min_size=1, max_size=50))
    def test_joined_they_are_what_was_split_bit_for_bit(self, bits):
        value = of_bits(bits)
        again = join(*split(value))
        assert torch.equal(again.isnan(), value.isnan())
        number = ~value.isnan()
        assert torch.equal(again.view(torch.int32)[number], value.view(torch.int32)[number])

    @given(bits=st.lists(BITS, min_size=1, max_size=50))
    def test_the_upper_is_the_nearest_bfloat16(self, bits):
        value = of_bits(bits)
        tie = (value.view(torch.int32) & 0xFFFF) == 0x8000
        expected = torch.where(tie, of_bits([b + 0x8000 for b in bits]), value).bfloat16()
        upper = split(value)[0]
        assert torch.equal(upper.isnan(), value.isnan())
        same = (upper == expected) | (upper.isnan() & expected.isnan()) | value.isnan()
        assert same.all()

    def test_a_gpu_s_nan_stays_one(self):
        upper, _ = split(of_bits([0x7FFFFFFF, 0xFFFFFFFF]))
        assert upper.isnan().all()


def models(split_first=False):
    """Return a model with fp32 bases and its twin, whose bases are split."""
    torch.manual_seed(0)
    exact = relora.add_low_rank_(Model(), TARGETS, rank=2, alpha=1.0, seed=4)
    twin = copy.deepcopy(exact)
    relora.split_bases_(twin)
    return exact, twin


def set_factors_(model, seed, std):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, site in relora.low_rank_sites(model):
            for factor in (site.lora_A, site.lora_B):
                factor.normal_(0, std, generator=generator)


class TestMerges:
    def test_add_up_as_in_fp32_where_bfloat16_alone_loses_them(self):
        exact, twin = models()
        coarse = copy.deepcopy(exact)
        for _, site in relora.low_rank_sites(coarse):
            site.weight.data = site.weight.data.bfloat16()
        start = [site.weight.clone() for _, site in relora.low_rank_sites(exact)]
        for seed in range(10):
            for model in (exact, twin, coarse):
                set_factors_(model, seed, 0.01)  # s B A is some 1e-4: under half a unit of most W
                relora.merge_(model)
        kept = lost = 0
        sites = zip(*(relora.low_rank_sites(m) for m in (exact, twin, coarse)), strict=True)
        for ((_, a), (_, b), (_, c)), first in zip(sites, start, strict=True):
            assert b.weight.dtype == torch.bfloat16
            assert torch.equal(bits(a.weight), bits(b.exact()))
            kept += (a.weight - first).norm() ** 2
            lost += (c.weight.float() - a.weight).norm() ** 2
        assert lost > kept / 4

    def test_a_restart_and_the_export_are_those_of_fp32(self):
        exact, twin = models()
        for model in (exact, twin):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained)
            for seed in range(3):
                set_factors_(model, seed, 0.1)
                relora.restart_(model, optimizer)
            set_factors_(model, 9, 0.1)  # and an update that is not merged yet
        expected = relora.merged_state_dict(exact)
        for name, tensor in relora.merged_state_dict(twin).items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.dtype == torch.float32

    def test_the_forward_computes_with_the_bfloat16_half(self):
        exact, twin = models()
        tokens = torch.randint(0, 11, (2, 5))
        for _, site in relora.low_rank_sites(exact):
            site.weight.data = site.weight.bfloat16().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(twin(tokens), exact(tokens))

    def test_removing_a_site_gives_its_weight_back_whole(self):
        layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
        weight, twin = layer.parametrizations.weight.original, copy.deepcopy(layer)
        relora.split_bases_(layer)
        for module in (layer, twin):
            set_factors_(module, 1, 0.1)
            relora.remove_low_rank(module)
        assert layer.weight is weight
        assert torch.equal(layer.weight, twin.weight)
        assert layer.weight.dtype == torch.float32

    def test_a_bfloat16_weight_is_extended(self):
        layer = relora.register_low_rank(nn.Linear(6, 4).bfloat16(), rank=2)
        before = layer.parametrizations.weight.original.detach().clone()
        relora.split_bases_(layer)
        site = relora.Site(layer, "weight")
        assert torch.equal(site.exact(), before.float())
        for seed in range(20):
            set_factors_(layer, seed, 0.004)
            update = site._delta()
            expected = update.add_(site.exact())
            site.merge_()
            assert torch.equal(site.exact(), expected)
        assert relora.merged_state_dict(layer)["weight"].dtype == torch.bfloat16


class TestState:
    def test_it_travels_in_the_state_dict(self):
        _, twin = models()
        set_factors_(twin, 1, 0.01)
        relora.merge_(twin)
        _, other = models()
        randomize_(other)
        other.load_state_dict(copy.deepcopy(twin.state_dict()))
        sites = zip(relora.low_rank_sites(twin), relora.low_rank_sites(other), strict=True)
        for (_, one), (_, two) in sites:
            assert torch.equal(one.exact(), two.exact())
            assert (one.exact() != one.weight.float()).any()

    def test_a_bfloat16_state_without_it_clears_it(self):
        _, twin = models()
        set_factors_(twin, 1, 0.01)
        relora.merge_(twin)
        coarse = {name: t for name, t in twin.state_dict().items() if "low_bits" not in name}
        twin.load_state_dict(copy.deepcopy(coarse))
        for _, site in relora.low_rank_sites(twin):
            assert torch.equal(site.exact(), site.weight.float())

    def test_a_state_without_the_weight_leaves_it(self):
        _, twin = models()
        set_factors_(twin, 1, 0.01)
        relora.merge_(twin)
        before = [site.exact() for _, site in relora.low_rank_sites(twin)]
        part = {name: t for name, t in twin.state_dict().items() if "_extra_state" in name}
        twin.load_state_dict(part, strict=False)
        for (_, site), value in zip(relora.low_rank_sites(twin), before, strict=True):
            assert torch.equal(site.exact(), value)

    @pytest.mark.parametrize("assign", [False, True])
    def test_an_fp32_state_is_split_as_it_is_loaded(self, assign):
        exact, twin = models()
        randomize_(exact)
        twin.load_state_dict(copy.deepcopy(exact.state_dict()), assign=assign)
        sites = zip(relora.low_rank_sites(exact), relora.low_rank_sites(twin), strict=True)
        for (_, one), (_, two) in sites:
            assert two.weight.dtype == torch.bfloat16
            assert torch.equal(bits(one.weight), bits(two.exact()))

    def test_it_is_there_to_be_filled_from_the_first(self):
        """Loaders that fill a state dict in place, as DCP does, pass over what it does not have."""
        with torch.device("meta"):
            on_meta = relora.add_low_rank_(Model(), TARGETS, rank=2, alpha=1.0, seed=4)
        relora.split_bases_(on_meta)
        model = on_meta.to_empty(device="cpu")
        _, twin = models()
        set_factors_(twin, 1, 0.01)
        relora.merge_(twin)
        state = model.state_dict()
        for name, tensor in twin.state_dict().items():
            state[name].copy_(tensor)
        model.load_state_dict(state)
        sites = zip(relora.low_rank_sites(model), relora.low_rank_sites(twin), strict=True)
        for (_, one), (_, two) in sites:
            assert torch.equal(bits(one.exact()), bits(two.exact()))

    def test_a_model_that_was_not_split_refuses_it(self):
        exact, twin = models()
        with pytest.raises(RuntimeError, match="low_bits"):
            exact.load_state_dict(twin.state_dict())

    def test_a_copy_has_its_own(self):
        _, twin = models()
        other = copy.deepcopy(twin)
        set_factors_(other, 1, 0.1)
        relora.merge_(other)
        (_, one), (_, two) = (next(iter(relora.low_rank_sites(m))) for m in (twin, other))
        assert not torch.equal(one.exact(), two.exact())


class TestRefusals:
    def test_what_cannot_be_split_is_refused_and_nothing_is_changed(self):
        exact, twin = models()
        with pytest.raises(ValueError, match="split already"):
            relora.split_bases_(twin)
        name, site = list(relora.low_rank_sites(exact))[-1]
        site.weight.data = site.weight.data.double()
        with pytest.raises(TypeError, match=f"{name}: W must be float32 or bfloat16; got .*64"):
            relora.split_bases_(exact)
        assert not any(s.weight.dtype == torch.bfloat16 for _, s in relora.low_rank_sites(exact))
        with pytest.raises(ValueError, match="no low-rank site"):
            relora.split_bases_(nn.Linear(2, 2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_a_conversion_after_the_split_is_refused(self, dtype):
        _, twin = models()
        twin.to(dtype)
        before = copy.deepcopy(twin.state_dict())
        for refused in (relora.merge_, relora.merged_state_dict):
            with pytest.raises(ValueError, match=r"a split W must stay bfloat16 .* now torch\.\w+"):
                refused(twin)
        assert all(torch.equal(t, before[name]) for name, t in twin.state_dict().items())

    def test_its_memory_is_not_given_out_to_be_filled(self):
        _, twin = models()
        with pytest.raises(ValueError, match="fill it before the split"):
            relora.base_state_dict(twin)

"""Sites of a model: what is chosen, what is refused, what merging and redrawing do."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import relora_core as relora
from tests.core.models import TARGETS, Model
from tests.reference import randomize_, ulp_distance

NAMES = [
    f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up", "mlp.down")
]


def low_rank_model(**options):
    return relora.add_low_rank_(Model(), TARGETS, **{"rank": 3, "alpha": 6.0, **options})


class TestChoice:
    def test_globs_span_dots_and_leave_the_rest_trainable(self):
        model = low_rank_model()
        assert [name for name, _ in relora.low_rank_sites(model)] == NAMES
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert frozen == [f"{name}.parametrizations.weight.original" for name in NAMES]

    def test_a_single_glob_may_be_a_string(self):
        model = relora.add_low_rank_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0", rank=1)
        assert [name for name, _ in relora.low_rank_sites(model)] == ["0"]

    def test_rank_pattern_gives_sites_their_own_rank_and_scale(self):
        model = low_rank_model(rank_pattern={"*.down": 2, "layers.0.*": 1})
        ranks = {name: (s.rank, s.scale) for name, s in relora.low_rank_sites(model)}
        assert ranks["layers.1.mlp.down"] == ranks["layers.0.mlp.down"] == (2, 3.0)
        assert ranks["layers.0.mlp.up"] == (1, 6.0)
        assert ranks["layers.1.mlp.up"] == (3, 2.0)

    def test_a_site_of_another_tensor_is_no_candidate(self):
        model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
        relora.register_low_rank(model[0], "in_proj_weight", rank=2)
        relora.add_low_rank_(model, "*", rank=2)
        names = ["0.in_proj_weight", "0.out_proj", "1"]
        assert [name for name, _ in relora.low_rank_sites(model)] == names

    def test_each_site_draws_its_own(self):
        model = low_rank_model(rank=8, rank_pattern={"*.down": 3, "*.up": 3})
        sites = dict(relora.low_rank_sites(model))
        one, other = (sites[f"layers.{i}.self_attn.q_proj"].lora_A for i in (0, 1))
        assert not torch.equal(one, other)

    def test_wrappers_change_neither_names_nor_draws(self):
        model, wrapped = Model(), Model()
        wrapped.layers[0] = checkpoint_wrapper(wrapped.layers[0])
        compiled = torch.compile(wrapped)
        for one in (model, compiled):
            relora.add_low_rank_(one, TARGETS, rank=3)
        plain = {name: s.lora_A for name, s in relora.low_rank_sites(model)}
        other = {name: s.lora_A for name, s in relora.low_rank_sites(compiled)}
        assert list(plain) == list(other) == NAMES
        assert all(torch.equal(plain[name], other[name]) for name in plain)
        assert list(relora.merged_state_dict(compiled)) == list(relora.merged_state_dict(model))

    @pytest.mark.parametrize("wrap", [checkpoint_wrapper, partial(torch.compile, backend="eager")])
    def test_a_wrapped_layer_is_one_site(self, wrap):
        """Wrappers answer for the attributes of what is inside them."""
        model = relora.add_low_rank_(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), "*", rank=2)
        x = torch.randn(5, 6)
        model[0] = wrap(model[0])
        assert [name for name, _ in relora.low_rank_sites(model)] == ["0", "1"]
        for _, site in relora.low_rank_sites(model):
            nn.init.normal_(site.lora_B)
        before = model(x)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        assert relora.restart_(model, optimizer).sites == 2
        torch.testing.assert_close(model(x), before)
        assert [site.restart for _, site in relora.low_rank_sites(model)] == [1, 1]


def _tied():
    model = Model()
    model.head.weight = model.embed.weight
    return model


def _weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def _integers():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


REFUSALS = [
    (Model, ["*.attention.*"], {}, ValueError, r"'\*.attention.\*' matches no module.*layers.0"),
    (Model, ["*.norm"], {}, ValueError, "matches no module"),
    (Model, [], {}, ValueError, "targets is empty"),
    (Model, TARGETS, {"rank": 9}, ValueError, r"layers.0.self_attn.q_proj: rank.*= 8.*got 9"),
    (Model, TARGETS, {"rank_pattern": {"*.up": 99}}, ValueError, "layers.0.mlp.up: rank"),
    (Model, TARGETS, {"rank_pattern": {"embed": 1}}, ValueError, "rank_pattern: 'embed' matches"),
    (Model, TARGETS, {"alpha": -1.0}, ValueError, "alpha must be positive"),
    (_tied, ["head"], {}, ValueError, r"head.weight is tied \(embed.weight, head.weight\)"),
    (
        _integers,
        ["0"],
        {},
        TypeError,
        "0: a low-rank weight must be float16, bfloat16, float32 or float64",
    ),
    (low_rank_model, TARGETS, {}, ValueError, "parametrized already"),
    (_weight_normed, "*", {}, ValueError, "parametrized already"),
]


@pytest.mark.parametrize(("make", "targets", "options", "error", "message"), REFUSALS)
def test_a_refused_call_changes_nothing(make, targets, options, error, message):
    model = make()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        relora.add_low_rank_(model, targets, **{"rank": 3, **options})
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
    def test_keeps_the_function(self, dtype, scale):
        model = relora.add_low_rank_(Model(), TARGETS, rank=3, alpha=3 * scale).to(dtype)
        randomize_(model, std=0.05)
        tokens = torch.randint(0, 11, (4, 5))
        before = model(tokens)
        relora.merge_(model)
        assert ulp_distance(model(tokens), before) <= 2

    def test_adds_the_scaled_product_and_zeroes_b(self):
        model = low_rank_model().double()
        randomize_(model)
        sites = dict(relora.low_rank_sites(model))
        want = {n: s.weight + s.scale * s.lora_B @ s.lora_A for n, s in sites.items()}
        relora.merge_(model)
        for name, site in sites.items():
            torch.testing.assert_close(site.weight.detach(), want[name].detach())
            assert not site.lora_B.any()

    def test_twice_is_once(self):
        model = low_rank_model()
        randomize_(model)
        relora.merge_(model)
        once = copy.deepcopy(model.state_dict())
        relora.merge_(model)
        for key, value in model.state_dict().items():
            assert torch.equal(value, once[key])

    @given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
    def test_rounds_a_weight_once(self, out, inner, dtype):
        layer = relora.register_low_rank(nn.Linear(inner, out, dtype=dtype), rank=1)
        randomize_(layer)
        site = relora.Site(layer, "weight")
        exact = site.weight.double() + site.scale * site.lora_B.double() @ site.lora_A.double()
        relora.merge_(layer)
        unit = torch.finfo(dtype).eps * exact.abs().clamp(min=1)
        assert ((site.weight.double() - exact).abs() <= unit).all()

    def test_without_sites_is_refused(self):
        with pytest.raises(ValueError, match="no low-rank site"):
            relora.merge_(Model())


class TestReinit:
    def test_draws_anew_each_time_and_reproducibly(self):
        one, other = low_rank_model(), low_rank_model()
        seen = []
        for _ in range(3):
            torch.rand(5)
            relora.reinit_(one)
            relora.reinit_(other)
            a = dict(relora.low_rank_sites(one))["layers.0.mlp.up"].lora_A.detach().clone()
            b = dict(relora.low_rank_sites(other))["layers.0.mlp.up"].lora_A
            assert torch.equal(a, b)
            assert not any(torch.equal(a, earlier) for earlier in seen)
            seen.append(a)

    def test_zeroes_b_and_leaves_w(self):
        model = low_rank_model()
        randomize_(model)
        sites = dict(relora.low_rank_sites(model))
        before = {name: site.weight.detach().clone() for name, site in sites.items()}
        relora.reinit_(model)
        for name, site in sites.items():
            assert torch.equal(site.weight, before[name])
            assert not site.lora_B.any()
            assert site.restart == 1

    def test_another_alpha_s_state_dict_is_refused(self):
        with pytest.raises(ValueError, match="saved with alpha=6 and has alpha=3"):
            low_rank_model(alpha=3.0).load_state_dict(low_rank_model(alpha=6.0).state_dict())

    def test_its_key_travels_in_the_state_dict(self):
        model, other = low_rank_model(seed=5), low_rank_model(seed=6)
        relora.reinit_(model)
        other.load_state_dict(model.state_dict())
        relora.reinit_(model)
        relora.reinit_(other)
        for (_, a), (_, b) in zip(
            relora.low_rank_sites(model), relora.low_rank_sites(other), strict=True
        ):
            assert torch.equal(a.lora_A, b.lora_A)
            assert b.restart == 2

    def test_a_model_from_the_meta_device_draws_the_same(self):
        with torch.device("meta"):
            model = low_rank_model()
        model.to_empty(device="cpu")
        for _, site in relora.low_rank_sites(model):
            site.low_rank.reset_parameters()
        for (_, a), (_, b) in zip(
            relora.low_rank_sites(model), relora.low_rank_sites(low_rank_model()), strict=True
        ):
            assert torch.equal(a.lora_A, b.lora_A)
            assert not a.lora_B.any()


class TestSerialization:
    def test_merged_weights_load_strictly_into_the_plain_model(self, tmp_path):
        from safetensors.torch import load_file

        model = low_rank_model()
        randomize_(model)
        tokens = torch.randint(0, 11, (4, 5))
        before = copy.deepcopy(model.state_dict())
        path = relora.save_merged(model, tmp_path / "out")
        assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
        (tmp_path / "plain").touch()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask has it
        plain = Model()
        plain.load_state_dict(load_file(path))
        torch.testing.assert_close(plain(tokens), model(tokens))
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])

    def test_tied_weights_are_written_under_both_names(self, tmp_path):
        from safetensors.torch import load_file

        model = relora.add_low_rank_(_tied(), TARGETS, rank=3)
        saved = load_file(relora.save_merged(model, tmp_path))
        assert torch.equal(saved["head.weight"], saved["embed.weight"])

    def test_a_module_under_two_names_is_merged_under_both(self):
        shared = relora.register_low_rank(nn.Linear(4, 4), rank=2)
        model = nn.ModuleDict({"a": shared, "b": shared})
        randomize_(model)
        merged = relora.merged_state_dict(model)
        assert set(merged) == {"a.weight", "a.bias", "b.weight", "b.bias"}
        assert torch.equal(merged["a.weight"], merged["b.weight"])

    def test_a_tensor_of_another_name_is_merged_too(self):
        module = relora.register_low_rank(nn.MultiheadAttention(8, 2), "in_proj_weight", rank=2)
        randomize_(module)
        merged = relora.merged_state_dict(module)
        assert set(merged) == set(nn.MultiheadAttention(8, 2).state_dict())
        torch.testing.assert_close(
            merged["in_proj_weight"], module.in_proj_weight.materialize().detach()
        )

    def test_a_plain_checkpoint_fills_the_base(self):
        plain, model = Model(), low_rank_model()
        base = relora.base_state_dict(model)
        assert set(base) == set(plain.state_dict())
        with torch.no_grad():
            for name, tensor in plain.state_dict().items():
                base[name].copy_(tensor)
        tokens = torch.randint(0, 11, (4, 5))
        torch.testing.assert_close(model(tokens), plain(tokens))


def test_repeated_small_merges_into_sixteen_bits_keep_fewer_digits_than_fp32():
    """Why W is best stored in fp32: the change of many small merges against its exact sum."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = relora.register_low_rank(nn.Linear(64, 64, bias=False, dtype=dtype), rank=4)
        site = relora.Site(layer, "weight")
        first = site.weight.double().clone()
        exact = torch.zeros_like(first)
        for _ in range(10):
            randomize_(layer, std=0.01)
            exact += site.scale * site.lora_B.double() @ site.lora_A.double()
            relora.merge_(layer)
        errors[dtype] = ((site.weight.double() - first - exact).norm() / exact.norm()).item()
    assert errors[torch.float32] < 1e-4
    assert errors[torch.bfloat16] > 0.05


def test_what_is_given_is_returned_wrapped_as_it_was():
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 4)))
    assert relora.add_low_rank_(compiled, "0", rank=2) is compiled
    assert [name for name, _ in relora.low_rank_sites(compiled)] == ["0"]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "model.safetensors/taken").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a regular file"):
        relora.save_merged(low_rank_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_sites_that_were_given_no_name_draw_apart_from_the_first_restart_on():
    model = nn.Sequential(*(relora.register_low_rank(nn.Linear(5, 5), rank=2) for _ in range(2)))
    named = relora.add_low_rank_(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), "*", rank=2)
    for whole in (model, named):
        relora.reinit_(whole)
    (one, two), (same, other) = (
        [site.lora_A for _, site in relora.low_rank_sites(whole)] for whole in (model, named)
    )
    assert not torch.equal(one, two)
    assert torch.equal(one, same)
    assert torch.equal(two, other)

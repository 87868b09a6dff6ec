"""Sites are those the user named: whole, untied, all or none."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import relora_core as relora
from tests.core.banks import FORMS, Bank
from tests.reference import randomize_


def names(model):
    return [name for name, _ in relora.low_rank_sites(model)]


def experts():
    """A router and its experts, as fused layers have them."""
    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": Bank(FORMS["loop"], dtype=None)})
    return nn.ModuleDict({"mlp": block, "head": nn.Linear(8, 5)})


class TestParameters:
    def test_of_another_name_are_targets_by_it(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        relora.add_low_rank_(model, ["*.in_proj_weight", "*.out_proj"], rank=2)
        assert names(model) == ["attention.in_proj_weight", "attention.out_proj"]

    @pytest.mark.parametrize("glob", ["*.in_proj_*", "attention.in_proj_weight", "*proj_weight"])
    def test_are_matched_by_the_last_part_of_a_glob(self, glob):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        relora.add_low_rank_(model, glob, rank=2)
        assert names(model) == ["attention.in_proj_weight"]

    def test_of_the_model_itself_are_targets(self):
        model = relora.add_low_rank_(Bank(FORMS["bmm"]), "experts", rank=2, batch_dims=1)
        assert names(model) == ["experts"]

    def test_keep_the_function_and_draw_by_their_name(self):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
        x = torch.randn(3, 1, 8)
        before = model["a"](x, x, x)[0]
        relora.add_low_rank_(model, "*.in_proj_weight", rank=2)
        torch.testing.assert_close(model["a"](x, x, x)[0], before)
        one, two = (site.lora_A for _, site in relora.low_rank_sites(model))
        assert not torch.equal(one, two)

    def test_a_glob_for_a_module_without_a_weight_says_that_its_parameters_have_names(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        with pytest.raises(ValueError, match=r"names no Parameter .*'attention.in_proj_weight'"):
            relora.add_low_rank_(model, "attention", rank=2)

    @pytest.mark.parametrize("glob", ["weights.*", "weights.1", "*", "weights*"])
    @pytest.mark.parametrize("keep", [list, lambda every: dict(zip("01", every, strict=True))])
    def test_in_lists_need_not_be_named(self, glob, keep):
        model, x = nn.Module(), torch.randn(3, 6)
        every = keep([nn.Parameter(torch.randn(4, 6)) for _ in range(2)])
        kind = nn.ParameterList if isinstance(every, list) else nn.ParameterDict
        model.weights = kind(every)
        relora.add_low_rank_(model, glob, rank=2)
        assert names(model) == ["weights.1"] if "1" in glob else ["weights.0", "weights.1"]
        randomize_(model)
        key = 1 if kind is nn.ParameterList else "1"
        before = F.linear(x, model.weights[key])
        torch.testing.assert_close(x @ relora.merged_state_dict(model)["weights.1"].t(), before)
        relora.merge_(model)
        torch.testing.assert_close(F.linear(x, model.weights[key]), before)

    @pytest.mark.parametrize(
        ("glob", "expected"),
        [("0.weight", ["0"]), ("*.weight", ["0", "1"]), ("*weight", ["0", "1"])],
    )
    def test_called_weight_may_be_named(self, glob, expected):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
        assert names(relora.add_low_rank_(model, glob, rank=2)) == expected

    def test_of_a_layer_by_itself_have_no_name_to_match(self):
        layer = nn.Linear(6, 4)
        with pytest.raises(ValueError, match=r"itself is a Linear, .* call register_low_rank"):
            relora.add_low_rank_(layer, "*", rank=2)

    @pytest.mark.parametrize("targets", [None, 3, [0], ["0", b"1"], {None: "0"}])
    def test_are_named_by_strings(self, targets):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
        with pytest.raises(TypeError, match="targets must be a glob or several"):
            relora.add_low_rank_(model, targets, rank=2)
        assert not names(model)


class TestCoverage:
    def test_a_glob_that_leaves_most_of_what_it_matches_says_so(self):
        model = experts()
        with pytest.warns(UserWarning, match=r"94% .*: mlp.experts.experts. .*'\*.experts' \(with"):
            relora.add_low_rank_(model, "mlp.*", rank=2)
        assert names(model) == ["mlp.gate"]

    def test_nothing_is_said_of_what_no_glob_matches_or_of_less_than_half(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            relora.add_low_rank_(experts(), "mlp.gate", rank=2)
            small = nn.ModuleDict({"a": nn.Linear(9, 9), "b": nn.Bilinear(2, 2, 2)})
            small.scale = nn.Parameter(torch.ones(3, 3))
            relora.add_low_rank_(small, "a", rank=2)
            frozen = experts()
            frozen["mlp"]["experts"].experts.requires_grad_(False)
            relora.add_low_rank_(frozen, "mlp.*", rank=2)

    def test_a_summary_names_sites_and_what_large_matrices_are_left(self):
        model = experts()
        relora.add_low_rank_(model, ["mlp.gate", "head"], rank=1)
        found = relora.summary(model)
        assert found.sites.keys() == {"mlp.gate", "head"}
        assert found.left == ("mlp.experts.experts",)
        assert found.whole["head.bias"].entries == 5
        assert "mlp.experts.experts: 4 x 16 x 8, whole" in str(found)
        assert "head: 5 x 8, rank 1" in str(found)

    def test_a_summary_counts_alike_ones_together(self):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        assert "* (3): 4 x 4, rank 1" in str(
            relora.summary(relora.add_low_rank_(model, "*", rank=1))
        )

    def test_a_summary_of_a_plain_model_has_no_site(self):
        assert relora.summary(nn.Linear(40, 40)).left == ("weight",)


class TestSharedModules:
    def model(self):
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        return nn.ModuleDict({"a": block, "b": block, "c": nn.Linear(4, 4)})

    @pytest.mark.parametrize("glob", ["*.0", "a.*", "b.0"])
    def test_are_one_site_under_the_first_name(self, glob):
        model = relora.add_low_rank_(self.model(), glob, rank=2)
        assert names(model) == ["a.0"]
        assert model["b"][0].parametrizations.weight[0].name == "a.0"

    def test_are_merged_once_and_exported_under_each_name(self):
        model = relora.add_low_rank_(self.model(), ["*.0", "c"], rank=2)
        randomize_(model)
        x = torch.randn(3, 4)
        before = model["b"](model["a"](x))
        merged = relora.merged_state_dict(model)
        assert torch.equal(merged["a.0.weight"], merged["b.0.weight"])
        plain = self.model()
        plain.load_state_dict(merged)
        torch.testing.assert_close(plain["b"](plain["a"](x)), before)
        relora.merge_(model)
        torch.testing.assert_close(model["b"](model["a"](x)), before)


def test_a_registration_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    relora.register_low_rank(nn.Linear(4, 4, device="meta"), rank=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_several_sites_fail_together(monkeypatch):
    """As where memory runs out at the third."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    before = dict(model.named_parameters())
    made = 0
    register = nn.utils.parametrize.register_parametrization

    def failing(*args, **kwargs):
        nonlocal made
        made += 1
        if made == 3:
            raise torch.OutOfMemoryError("planted")
        return register(*args, **kwargs)

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", failing)
    with pytest.raises(torch.OutOfMemoryError):
        relora.add_low_rank_(model, "*", rank=2)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and p.requires_grad for name, p in before.items())
    assert all(type(layer) is nn.Linear for layer in model)


class Packed(nn.Linear):
    """A few-bit layer whose codes lie in a floating-point dtype."""

    def __init__(self):
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(16, 1))


def offloaded():
    layer = nn.Linear(4, 4, device="meta")
    layer._hf_hook = object()
    return layer


def quantized():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Sequential(nn.Linear(32, 32))
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return layer[0]


def four_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_storage=torch.bfloat16)
    return layer.to("cpu")


def holding(weight):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 1).expand(4, 4),
        torch.randn(4).expand(4, 4),
        torch.randn(7).as_strided((4, 4), (1, 1)),
    ],
)
def test_a_weight_whose_entries_lie_on_each_other_is_refused(weight):
    model = nn.Sequential(holding(weight))
    with pytest.raises(ValueError, match="must have memory for each entry"):
        relora.add_low_rank_(model, "0", rank=1)
    assert not names(model)


@pytest.mark.parametrize(
    "weight", [torch.randn(4, 4).t(), torch.randn(4, 8)[:, ::2], torch.randn(9, 4)[1:8:2]]
)
def test_a_weight_with_strides_is_merged_into(weight):
    model = relora.add_low_rank_(nn.Sequential(holding(weight)), "0", rank=1)
    randomize_(model)
    x = torch.randn(3, 4)
    before = model(x)
    relora.merge_(model)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    "register",
    [torch.Tensor.register_hook, nn.Parameter.register_post_accumulate_grad_hook],
)
def test_a_weight_whose_hooks_would_never_be_called_is_refused(register):
    model = nn.Sequential(nn.Linear(4, 4))
    handle = register(model[0].weight, lambda grad: None)
    with pytest.raises(ValueError, match=r"0: Linear.weight has gradient hooks"):
        relora.add_low_rank_(model, "0", rank=1)
    with pytest.raises(ValueError, match="has gradient hooks"):
        relora.register_low_rank(model[0], rank=1)
    handle.remove()
    assert names(relora.add_low_rank_(model, "0", rank=1)) == ["0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Packed, r"Packed.weight has shape \(16, 1\) in a layer of 8 x 8: it is packed"),
        (offloaded, "is offloaded by hooks"),
        (quantized, "Linear.weight is a .*, which a merge cannot write to"),
        (four_bits, "Linear4bit.weight has shape .* packed"),
        (lambda: holding(torch.eye(4).to(torch.float8_e4m3fn)), "must be .*; got torch.float8"),
        (lambda: holding(torch.eye(4).to_sparse()), "must be dense; got torch.sparse_coo"),
    ],
)
def test_what_a_merge_cannot_write_to_is_refused(make, message):
    model = nn.Sequential(make())
    with pytest.raises(TypeError, match=message):
        relora.add_low_rank_(model, "0", rank=1)
    assert not names(model)

"""One site: any module is right, registering and removing cancel, refusals change nothing."""

import copy
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import relora_core as relora
from tests.core.models import ByOperators
from tests.reference import dense_twin, randomize_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class TransposedConv1D(nn.Module):
    """The layer of GPT-2 in transformers: the weight lies (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True)


MODULES = {
    "linear": (lambda: nn.Linear(6, 4), "weight", (3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), "weight", (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), "weight", (2, 4, 6, 6)),
    "conv transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), "weight", (2, 4, 5, 5)),
    "transposed linear": (TransposedConv1D, "weight", (3, 6)),
    "operators": (ByOperators, "weight", (3, 4)),
    "bilinear": (lambda: nn.Bilinear(5, 5, 4), "weight", (3, 5)),
    "attention": (attention, "in_proj_weight", (2, 3, 8)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_every_module_computes_with_the_dense_sum(kind, training):
    make, tensor_name, shape = MODULES[kind]
    module = relora.register_low_rank(make().double(), tensor_name, rank=2, alpha=3.0)
    randomize_(module)
    plain, dense = dense_twin(module, tensor_name)
    module.train(training)
    plain.train(training)
    x = torch.randn(shape, dtype=torch.float64)
    copies = {"attention": 3, "bilinear": 2}.get(kind, 1)
    y, expected = module(*[x] * copies), plain(*[x] * copies)
    y, expected = (out[0] if isinstance(out, tuple) else out for out in (y, expected))
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    site = relora.Site(module, tensor_name)
    torch.testing.assert_close(site.lora_A.grad, dense.lora_A.grad)
    torch.testing.assert_close(site.lora_B.grad, dense.lora_B.grad)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_embedding_gradients_equal_those_of_the_dense_sum(options):
    module = relora.register_low_rank(nn.Embedding(9, 4, **options).double(), rank=3, alpha=2.0)
    randomize_(module)
    plain, dense = dense_twin(module)
    tokens = torch.tensor([[1, 2, 2], [8, 1, 0]])
    g = torch.randn(2, 3, 4, dtype=torch.float64)
    module(tokens).backward(g)
    plain(tokens).backward(g)
    site = relora.Site(module, "weight")
    torch.testing.assert_close(module(tokens), plain(tokens))
    torch.testing.assert_close(site.lora_A.grad, dense.lora_A.grad)
    torch.testing.assert_close(site.lora_B.grad, dense.lora_B.grad)


def test_the_output_head_of_attention_is_right_too():
    module = attention()
    relora.add_low_rank_(module, "out_proj", rank=2)
    randomize_(module)
    plain = attention()
    plain.load_state_dict(relora.merged_state_dict(module))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(module(x, x, x)[0], plain(x, x, x)[0])


class TestRegisterAndRemove:
    def test_cancel_to_the_same_parameter(self):
        layer = nn.Linear(6, 4)
        weight, before = layer.weight, layer.weight.detach().clone()
        relora.register_low_rank(layer, rank=2)
        assert not weight.requires_grad
        relora.remove_low_rank(layer)
        assert layer.weight is weight
        assert weight.requires_grad
        assert torch.equal(weight, before)
        assert type(layer) is nn.Linear
        assert list(layer.state_dict()) == ["weight", "bias"]

    def test_a_frozen_weight_stays_frozen(self):
        layer = nn.Linear(6, 4).requires_grad_(False)
        relora.remove_low_rank(relora.register_low_rank(layer, rank=2))
        assert not layer.weight.requires_grad

    def test_merging_keeps_the_function_and_dropping_gives_the_base_back(self):
        layer = relora.register_low_rank(nn.Linear(6, 4).double(), rank=2, alpha=6.0)
        randomize_(layer)
        x = torch.randn(3, 6, dtype=torch.float64)
        base = relora.Site(layer, "weight").weight.detach().clone()
        kept = relora.remove_low_rank(copy.deepcopy(layer))
        dropped = relora.remove_low_rank(copy.deepcopy(layer), merge=False)
        torch.testing.assert_close(kept(x), layer(x))
        assert torch.equal(dropped.weight, base)

    def test_removing_from_a_copy_leaves_the_original(self):
        layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
        twin = copy.deepcopy(layer)
        relora.remove_low_rank(twin)
        assert relora.is_low_rank(layer)
        assert not relora.is_low_rank(twin)
        layer(torch.randn(2, 6))

    def test_the_function_is_the_same_bit_for_bit_at_first(self):
        layer = nn.Linear(6, 4)
        x = torch.randn(3, 6)
        before = layer(x)
        assert torch.equal(relora.register_low_rank(layer, rank=2)(x), before)


class TestInitialDraw:
    def test_both_factors_learn_within_two_steps(self):
        layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
        site = relora.Site(layer, "weight")
        optimizer = torch.optim.SGD([site.lora_A, site.lora_B], lr=0.1)
        a, b = site.lora_A.detach().clone(), site.lora_B.detach().clone()
        for _ in range(2):
            layer(torch.randn(3, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(site.lora_A, a)
        assert not torch.equal(site.lora_B, b)

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**63 - 1), st.text(max_size=5))
    def test_depends_on_its_key_alone_and_lies_within_its_bound(self, out, inner, seed, name):
        rank = min(out, inner)
        draws = []
        for _ in range(2):
            torch.rand(3)  # whatever the global generator has been used for
            low_rank = relora.LowRank(torch.zeros(out, inner), rank=rank, seed=seed, name=name)
            draws.append(low_rank.lora_A.detach())
        assert torch.equal(*draws)
        assert draws[0].abs().max() <= inner**-0.5
        assert not low_rank.lora_B.any()

    @pytest.mark.parametrize("change", [{"seed": 1}, {"name": "b"}])
    def test_differs_with_seed_and_name(self, change):
        base = {"rank": 3, "seed": 0, "name": "a"}
        one = relora.LowRank(torch.zeros(5, 7), **base)
        other = relora.LowRank(torch.zeros(5, 7), **{**base, **change})
        assert not torch.equal(one.lora_A, other.lora_A)

    def test_leaves_the_global_generator_alone(self):
        state = torch.get_rng_state()
        relora.LowRank(torch.zeros(4, 6), rank=2)
        assert torch.equal(state, torch.get_rng_state())

    def test_is_the_distribution_of_kaiming_uniform(self):
        low_rank = relora.LowRank(torch.zeros(300, 400), rank=256)
        like = nn.init.kaiming_uniform_(torch.empty(256, 400), a=5**0.5)
        assert low_rank.lora_A.std().item() == pytest.approx(like.std().item(), rel=0.02)
        assert low_rank.lora_A.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)


class TestLazyWeight:
    def test_shows_the_base_s_facts_without_forming_anything(self):
        weight = relora.register_low_rank(nn.Linear(6, 4), rank=2).weight
        assert weight.shape == weight.size() == (4, 6)
        assert weight.size(1) == 6
        assert (weight.ndim, weight.dim(), weight.numel()) == (2, 2, 24)
        assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
        assert weight.requires_grad

    def test_refuses_a_second_parametrization(self):
        layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
        with pytest.raises(ValueError, match="_WeightNorm would parametrize a low-rank site"):
            nn.utils.parametrizations.weight_norm(layer)
        assert len(layer.parametrizations.weight) == 1
        assert layer(torch.ones(1, 6)).shape == (1, 4)
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))  # a plain one may

    def test_refuses_what_would_be_lost(self):
        layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
        with pytest.raises(AttributeError, match=r"parametrizations.weight.original"):
            layer.weight.zero_()
        with pytest.raises(AttributeError, match=r"write through normal_ would"):
            nn.init.normal_(layer.weight)
        with pytest.raises(AttributeError, match=r"write through data would"):
            layer.weight.data.zero_()
        with pytest.raises(AttributeError, match=r"write through out would"):
            torch.add(torch.ones(4, 6), 1, out=layer.weight)
        with pytest.raises(AttributeError, match=r"write through _foreach_zero_ would"):
            torch._foreach_zero_([layer.weight])
        with pytest.raises(AttributeError, match=r"setting entries would"):
            layer.weight[0] = 1
        with pytest.raises(NotImplementedError, match=r"cannot be assigned or changed in place"):
            layer.weight *= 2
        with pytest.raises(NotImplementedError, match=r"cannot be assigned"):
            layer.weight = torch.zeros(4, 6)

    @pytest.mark.parametrize(
        "write",
        [
            lambda x, weight: x.add_(weight, alpha=0.5),
            lambda x, weight: x.copy_(weight),
            lambda x, weight: x.lerp_(weight, 0.1),
            lambda x, weight: x.addmm_(torch.ones(4, 4), weight),
            lambda x, weight: operator.iadd(x, weight),
            lambda x, weight: torch.add(weight, 1, out=x),
        ],
    )
    def test_may_be_written_to_others(self, write):
        layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
        nn.init.normal_(layer.parametrizations.weight[0].lora_B)
        with torch.no_grad():
            x, expected = torch.ones(4, 6), torch.ones(4, 6)
            write(x, layer.weight)
            write(expected, layer.weight.materialize())
        assert torch.equal(x, expected)

    @pytest.mark.parametrize("stored", DTYPES)
    @pytest.mark.parametrize("factors", DTYPES)
    def test_a_merge_of_nothing_leaves_every_bit_whatever_the_dtypes(self, stored, factors):
        layer = relora.register_low_rank(nn.Linear(16, 16, dtype=stored), rank=2)
        site = relora.Site(layer, "weight")
        site.low_rank.to(factors)
        before = site.weight.detach().clone()
        assert torch.equal(layer.weight.materialize(), before)
        relora.merge_(layer)
        assert torch.equal(site.weight, before)

    def test_sixteen_bit_sum_is_rounded_once(self):
        layer = relora.register_low_rank(nn.Linear(64, 64, dtype=torch.bfloat16), rank=8)
        randomize_(layer, std=0.05)
        site = relora.Site(layer, "weight")
        exact = site.weight.double() + site.scale * (site.lora_B.double() @ site.lora_A.double())
        assert torch.equal(layer.weight.materialize(), exact.bfloat16())

    def test_autocast_does_not_coarsen_the_sum(self):
        layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
        randomize_(layer)
        expected = layer.weight.materialize()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.weight.materialize(), expected)

    def test_autocast_does_not_coarsen_an_embedding(self):
        layer = relora.register_low_rank(nn.Embedding(9, 4), rank=2)
        randomize_(layer)
        tokens = torch.arange(9)
        expected = layer(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(tokens), expected)
            compiled = torch.compile(lambda t: layer(t), fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(tokens), expected)

    def test_frozen_base_and_trained_factors_of_another_dtype_meet_in_the_base_s(self):
        layer = relora.register_low_rank(nn.Linear(6, 4, dtype=torch.bfloat16), rank=2)
        low_rank = relora.Site(layer, "weight").low_rank
        low_rank.to(torch.float32)
        randomize_(layer)
        y = layer(torch.randn(3, 6, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert low_rank.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "attention", "transposed linear"])
def test_modules_that_form_the_sum_compile_whole(kind):
    make, tensor_name, shape = MODULES[kind]
    module = relora.register_low_rank(make(), tensor_name, rank=2)
    randomize_(module)
    x = torch.randn(shape)
    inputs = [x] * (3 if kind == "attention" else 1)
    first = (lambda out: out[0]) if kind == "attention" else (lambda out: out)
    compiled = torch.compile(lambda *x: first(module(*x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), first(module(*inputs)))


class TestProductsByOperator:
    """Compiled, dynamo hands over `weight @ x` as it does `x @ weight`."""

    class Square(nn.Module):
        def __init__(self, left):
            super().__init__()
            self.weight, self.left = nn.Parameter(torch.randn(4, 4)), left

        def forward(self, x):
            return self.weight @ x if self.left else x @ self.weight

    def made(self, left):
        torch.compiler.reset()
        module = relora.register_low_rank(self.Square(left), rank=2)
        randomize_(module)
        return module

    @pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
    @pytest.mark.parametrize("width", [3, 4])
    def test_are_in_their_order(self, left, width):
        module = self.made(left)
        x = torch.randn(4, width) if left else torch.randn(width, 4)
        compiled = torch.compile(module, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
        whole = module.weight.materialize()
        torch.testing.assert_close(module(x), whole @ x if left else x @ whole)

    def test_are_refused_where_a_whole_graph_could_be_either(self):
        module = self.made(left=True)
        with pytest.raises(Exception, match=r"torch.matmul\(x, weight\)"):
            torch.compile(module, backend="aot_eager", fullgraph=True)(torch.randn(4, 4))


class TestNotes:
    def test_on_the_parameter_from_before_are_read_and_new_ones_refused(self):
        layer = nn.Linear(4, 3)
        layer.weight.mine = "noted"
        relora.register_low_rank(layer, rank=2)
        assert layer.weight.mine == "noted"
        with pytest.raises(AttributeError, match="no attribute 'yours'"):
            _ = layer.weight.yours
        with pytest.raises(AttributeError, match=r"setting mine would .* be lost"):
            layer.weight.mine = "else"

    @pytest.mark.parametrize(
        "call",
        [
            lambda weight: weight.register_hook(print),
            lambda weight: weight.register_post_accumulate_grad_hook(print),
            lambda weight: weight.retain_grad(),
        ],
    )
    def test_hooks_are_refused_at_once(self, call):
        layer = relora.register_low_rank(nn.Linear(4, 3), rank=2)
        with pytest.raises(AttributeError, match=r"Write to `parametrizations.weight.original`"):
            call(layer.weight)

    def test_freezing_is_of_the_factors(self):
        layer = relora.register_low_rank(nn.Linear(4, 3), rank=2)
        with pytest.raises(AttributeError, match="freeze its factors"):
            layer.weight.requires_grad_(False)
        with pytest.raises(AttributeError, match="freeze its factors"):
            layer.weight.requires_grad = False

    def test_facts_need_no_sum(self):
        layer = relora.register_low_rank(nn.Linear(4, 3), rank=2)
        W = layer.parametrizations.weight.original
        assert layer.weight.grad is None
        assert layer.weight.data_ptr() == W.data_ptr()
        assert not layer.weight.is_meta
        assert len(layer.weight) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")
def test_a_jit_trace_computes_the_same():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    relora.add_low_rank_(model, "*", rank=2)
    randomize_(model)
    traced = torch.jit.trace(model, torch.randn(3, 5))
    x = torch.randn(7, 5)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("tokens", [4, 400], ids=["two paths", "merged"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_it_returns_may_be_written_in_place(tokens, bias):
    layer = relora.register_low_rank(nn.Linear(8, 6, bias=bias), rank=2)
    randomize_(layer)
    x = torch.randn(tokens, 8, requires_grad=True)
    expected = torch.autograd.grad((layer(x) * 2 + 1).relu().sum(), x)
    found = torch.autograd.grad(layer(x).mul_(2).add_(1).relu_().sum(), x)
    assert torch.equal(found[0], expected[0])


def test_per_sample_gradients_are_those_of_a_loop():
    layer = relora.register_low_rank(nn.Linear(6, 4).double(), rank=2)
    randomize_(layer)
    named = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(5, 6, dtype=torch.float64)

    def loss(named, x):
        return torch.func.functional_call(layer, named, (x,)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(named, x)
    for index in range(5):
        one = torch.func.grad(loss)(named, x[index])
        for name in one:
            torch.testing.assert_close(together[name][index], one[name])


def test_a_nested_input_is_right():
    layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
    randomize_(layer)
    parts = [torch.randn(n, 6) for n in (2, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: nested tensors are a prototype
        out = layer(torch.nested.nested_tensor(parts))
    for part, y in zip(parts, out.unbind(), strict=True):
        torch.testing.assert_close(y, layer(part))


def _embedding_with_max_norm():
    return nn.Embedding(9, 4, max_norm=1.0)


def _bag_with_max_norm():
    return nn.EmbeddingBag(9, 4, max_norm=1.0)


def _already_low_rank():
    return relora.register_low_rank(nn.Linear(6, 4), rank=2)


REFUSALS = [
    (lambda: nn.Linear(6, 4), {"rank": 5}, ValueError, r"between 1 and min\(out, in\) = 4.*got 5"),
    (lambda: nn.Linear(6, 4), {"rank": 0}, ValueError, "got 0"),
    (lambda: nn.Linear(6, 4), {"rank": 2.0}, TypeError, "rank must be an int; got 2.0"),
    (lambda: nn.Linear(6, 4), {"rank": True}, TypeError, "rank must be an int; got True"),
    (lambda: nn.Linear(6, 4), {"rank": 2, "seed": 0.0}, TypeError, "seed must be an int; got 0.0"),
    (lambda: nn.Linear(6, 4), {"rank": 2, "alpha": 0.0}, ValueError, "alpha must be positive"),
    (lambda: nn.Linear(6, 4), {"rank": 2, "alpha": float("inf")}, ValueError, "alpha must be"),
    (lambda: nn.Linear(6, 4), {"rank": 2, "seed": -1}, ValueError, "seed must be between"),
    (lambda: nn.Linear(6, 4), {"rank": 2, "tensor_name": "bias"}, ValueError, "two dimensions"),
    (lambda: nn.Linear(6, 4), {"rank": 2, "tensor_name": "w"}, ValueError, "no Parameter 'w'"),
    (lambda: nn.LazyLinear(4), {"rank": 2}, ValueError, "run one batch through it"),
    (_embedding_with_max_norm, {"rank": 2}, ValueError, "Embedding with max_norm"),
    (_bag_with_max_norm, {"rank": 2}, ValueError, "EmbeddingBag with max_norm"),
    (_already_low_rank, {"rank": 2}, ValueError, "parametrized already"),
]


@pytest.mark.parametrize(("make", "arguments", "error", "message"), REFUSALS)
def test_a_refused_registration_changes_nothing(make, arguments, error, message):
    module = make()
    before = {name: id(p) for name, p in module.named_parameters()}
    trained = [p.requires_grad for p in module.parameters()]
    with pytest.raises(error, match=message):
        relora.register_low_rank(module, **arguments)
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert [p.requires_grad for p in module.parameters()] == trained


def test_removing_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"Linear.weight is not a low-rank site"):
        relora.remove_low_rank(nn.Linear(6, 4))


def test_functional_use_outside_a_module_is_right():
    layer = relora.register_low_rank(nn.Linear(6, 4), rank=2)
    randomize_(layer)
    x = torch.randn(3, 6)
    torch.testing.assert_close(
        F.linear(x, layer.weight, layer.bias), F.linear(x, layer.weight.materialize(), layer.bias)
    )
    torch.testing.assert_close(  # as the input rather than the weight
        F.linear(layer.weight, torch.ones(2, 6)),
        F.linear(layer.weight.materialize(), torch.ones(2, 6)),
    )

"""The linear: equal to the dense sum in both of its forms, without the dense sum's gradient."""

import copy
import gc
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import relora_core as relora
from relora_core.products import linear
from relora_core.products.merged import MergedLinear
from tests.reference import dense_twin, randomize_

FORMS = {"two paths": math.inf, "merged": 0}


@pytest.fixture(autouse=True, params=FORMS)
def form(request):
    """Compute every test's linears in one form, then in the other."""
    with mock.patch.object(linear, "MERGED_FROM", FORMS[request.param]):
        yield request.param


def low_rank_layer(out=5, inner=7, rank=3, bias=True, dtype=torch.float64):
    layer = nn.Linear(inner, out, bias=bias, dtype=dtype)
    relora.register_low_rank(layer, rank=rank, alpha=2.0 * rank)
    randomize_(layer)
    return layer


@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 9),
    batch=st.lists(st.integers(0, 4), max_size=3),
    bias=st.booleans(),
    data=st.data(),
)
def test_gradients_equal_those_of_the_dense_sum(out, inner, batch, bias, data):
    rank = data.draw(st.integers(1, min(out, inner)))
    layer = low_rank_layer(out, inner, rank, bias)
    plain, dense = dense_twin(layer)
    x = torch.randn(*batch, inner, dtype=torch.float64, requires_grad=True)
    x_plain = x.detach().clone().requires_grad_()
    g = torch.randn(*batch, out, dtype=torch.float64)
    y, y_plain = layer(x), plain(x_plain)
    y.backward(g)
    y_plain.backward(g)
    site = relora.Site(layer, "weight")
    torch.testing.assert_close(y, y_plain)
    torch.testing.assert_close(x.grad, x_plain.grad)
    torch.testing.assert_close(site.lora_A.grad, dense.lora_A.grad)
    torch.testing.assert_close(site.lora_B.grad, dense.lora_B.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert site.weight.grad is None


def test_first_and_second_derivatives_pass_gradcheck():
    layer = low_rank_layer()
    parameters = dict(layer.named_parameters())

    def apply(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    inputs = [torch.randn(2, 7, dtype=torch.float64)]
    inputs += [p.detach().clone() for p in parameters.values()]
    for tensor in inputs:  # W too: whoever unfreezes it gets its gradient
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


def test_a_weight_used_twice_sums_its_gradients():
    layer = low_rank_layer(7, 7)
    plain, dense = dense_twin(layer)
    x = torch.randn(4, 7, dtype=torch.float64)
    layer(layer(x)).sum().backward()
    plain(plain(x)).sum().backward()
    site = relora.Site(layer, "weight")
    torch.testing.assert_close(site.lora_A.grad, dense.lora_A.grad)
    torch.testing.assert_close(site.lora_B.grad, dense.lora_B.grad)


def test_an_input_without_gradient_gets_none():
    layer = low_rank_layer()
    x = torch.randn(4, 7, dtype=torch.float64)
    layer(x).sum().backward()
    assert x.grad is None
    assert relora.Site(layer, "weight").lora_B.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_a_plain_linear_does(dtype):
    layer = low_rank_layer(dtype=torch.float32)
    merged = nn.Linear(7, 5)
    merged.load_state_dict(relora.merged_state_dict(layer))
    x = torch.randn(4, 7)
    with torch.autocast("cpu", dtype=dtype):
        y, expected = layer(x), merged(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert relora.Site(layer, "weight").lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_from_outside_and_inside(backend):
    layer = low_rank_layer(dtype=torch.float32)
    x = torch.randn(4, 7, requires_grad=True)
    expected = layer(x)
    outside = torch.compile(lambda x: layer(x) * 2, fullgraph=True, backend=backend)
    torch.testing.assert_close(outside(x), expected * 2)
    layer.compile(fullgraph=True, backend=backend)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert relora.Site(layer, "weight").lora_B.grad is not None


def routed(layer, x):
    """Compute the rows that begin with a positive number, whose count depends on the data."""
    return layer(x[(x[:, 0] > 0).nonzero().squeeze(1)])


def test_compiles_whole_over_a_number_of_tokens_that_depends_on_data():
    layer = low_rank_layer(dtype=torch.float32)
    x = torch.randn(9, 7)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(layer, x), routed(layer, x))


def test_is_exported_for_every_number_of_tokens():
    layer = low_rank_layer(dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(layer, (torch.randn(50, 7),), dynamic_shapes=({0: batch},))
    for tokens in (2, 300):
        x = torch.randn(tokens, 7)
        torch.testing.assert_close(exported.module()(x), layer(x))


class TestCost:
    T, M, N, R = 4096, 2048, 2048, 128

    def flops(self, layer):
        x = torch.empty(self.T, self.N, device="meta", requires_grad=True)
        # torch's counter leaves out the in-place addmm_: count it as addmm.
        extra = {torch.ops.aten.addmm_: lambda y, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=extra) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops()

    def test_each_form_costs_what_its_formula_says(self, form):
        T, m, n, r = self.T, self.M, self.N, self.R
        layer = nn.Linear(n, m, bias=False, device="meta")
        full = self.flops(layer)
        assert full == 6 * T * m * n
        low_rank = self.flops(relora.register_low_rank(layer, rank=r))
        thin = {"two paths": 6 * T * r * (m + n), "merged": 4 * T * r * (m + n) + 4 * m * n * r}
        assert low_rank == 4 * T * m * n + thin[form]
        assert low_rank / full <= 0.80

    def test_a_dense_parametrization_costs_more_than_full_rank(self):
        layer = nn.Linear(self.N, self.M, bias=False)
        full = self.flops(nn.Linear(self.N, self.M, bias=False, device="meta"))
        relora.register_low_rank(layer, rank=self.R)
        plain, _ = dense_twin(layer)
        assert self.flops(plain.to("meta")) / full >= 1.0

    def test_only_the_output_and_the_input_s_gradient_are_made_whole(self, form):
        T, n, m, r = 37, 64, 48, 4
        names = {(T, n): "T n", (T, m): "T m", (m, n): "m n", (n, m): "m n"}
        layer = relora.register_low_rank(nn.Linear(n, m), rank=r, alpha=3.0)
        x = torch.randn(T, n, requires_grad=True)
        g = torch.randn(T, m)
        seen = {x.data_ptr(), g.data_ptr(), relora.Site(layer, "weight").weight.data_ptr()}
        made, alive = [], []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for one in out if isinstance(out, tuple | list) else [out]:
                    if isinstance(one, torch.Tensor) and one.data_ptr() not in seen:
                        seen.add(one.data_ptr())
                        alive.append(one)  # so that no address is used again
                        made.append(names.get(tuple(one.shape), "small"))
                return out

        sums = {"two paths": [], "merged": ["m n", "m n"]}[form]  # in forward, in backward
        with Watch():
            layer(x).backward(g)
        assert sorted(name for name in made if name != "small") == ["T m", "T n", *sums]
        made.clear()
        with Watch():
            F.linear(x, layer.weight.materialize()).backward(g)
        assert made.count("m n") > len(sums)  # the watch does see a dense gradient

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_input_and_at_most_rank_numbers_a_token_are_kept_for_backward(self, bias, form):
        T, n, m, r = 37, 64, 48, 4
        layer = relora.register_low_rank(nn.Linear(n, m, bias=bias), rank=r)
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept = {}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(T, n, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x)
        thin = {"two paths": [4 * T * r], "merged": []}[form]
        assert sorted(kept.values()) == [*thin, 4 * T * n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_near_to_float64_as_a_plain_linear(dtype):
    layer = low_rank_layer(24, 40, 6, dtype=torch.float64)
    exact = copy.deepcopy(layer)
    merged = nn.Linear(40, 24).double()
    merged.load_state_dict(relora.merged_state_dict(layer))
    layer.to(dtype), merged.to(dtype)
    site, exact_site = relora.Site(layer, "weight"), relora.Site(exact, "weight")
    x, g = torch.randn(64, 40, dtype=dtype), torch.randn(64, 24, dtype=dtype)
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, y64, plain = layer(x), exact(x64), merged(x)
    y.backward(g)
    y64.backward(g.double())

    def error(ours, exact):
        return ((ours.double() - exact).norm() / exact.norm()).item()

    assert y.dtype == site.lora_A.grad.dtype == dtype
    assert error(y, y64) <= 2 * error(plain, y64)
    tolerance = 4 * torch.finfo(dtype).eps
    assert error(x.grad, x64.grad) <= tolerance
    assert error(site.lora_A.grad, exact_site.lora_A.grad) <= tolerance
    assert error(site.lora_B.grad, exact_site.lora_B.grad) <= tolerance


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


class Transposed(nn.Module):
    """A linear as GPT-2 has it: W is (in, out), and the bias is added to the product."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((24, 16), (16,))
        )

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_added_to_a_product_is_a_linear_s(compiled, form):
    layer = relora.register_low_rank(Transposed(), rank=2)
    site = relora.Site(layer, "weight")
    nn.init.normal_(site.lora_B)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    expected = torch.addmm(layer.bias, x, layer.weight.materialize())
    expected.square().sum().backward()
    old = [p.grad for p in (x, site.lora_A, site.lora_B, layer.bias)]
    for p in (x, site.lora_A, site.lora_B, layer.bias):
        p.grad = None
    if compiled:
        y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    else:
        with FlopCounterMode(display=False) as counted:
            y = layer(x)
        paths = counted.get_total_flops() == 2 * 5 * (24 * 16 + 2 * 24 + 2 * 16)
        assert paths == (form == "two paths")
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    for p, grad in zip((x, site.lora_A, site.lora_B, layer.bias), old, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize(
    "call",
    [
        lambda w, x: torch.addmm(ones(5, 16), x, w),
        lambda w, x: torch.addmm(ones(16), x, w, beta=0.5, alpha=2),
        lambda w, x: torch.addmm(input=ones(16), mat1=x, mat2=w),
        lambda w, x: torch.addmm(w, ones(24, 5), ones(5, 16)),
        lambda w, x: torch.addmm(ones(24, 2), w, ones(16, 2)),
        lambda w, x: ones(16).addmm(x, w),
        lambda w, x: x @ torch.transpose(torch.transpose(w, dim0=0, dim1=1), 0, 1),
        lambda w, x: x @ torch.transpose(input=w.transpose(dim0=0, dim1=1), dim0=0, dim1=1),
        lambda w, x: torch.stack(torch.unbind(input=w, dim=0)),
    ],
)
def test_every_sum_with_a_product_equals_the_dense_one(call):
    layer = relora.register_low_rank(Transposed(), rank=2)
    nn.init.normal_(relora.Site(layer, "weight").lora_B)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(call(layer.weight, x), call(layer.weight.materialize(), x))
    with torch.no_grad():
        written = torch.addmm(ones(16), x, layer.weight, out=ones(5, 16))
    torch.testing.assert_close(written, 1 + x @ layer.weight.materialize())


def test_activation_checkpointing_changes_no_bit():
    layer = low_rank_layer(dtype=torch.float32)
    site = relora.Site(layer, "weight")
    x = torch.randn(4, 7)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in (site.lora_A, site.lora_B, layer.bias)]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(map(torch.equal, (site.lora_A.grad, site.lora_B.grad, layer.bias.grad), expected))


def test_a_forward_that_is_recomputed_in_part_leaves_nothing_to_the_collector():
    layer = low_rank_layer(dtype=torch.float32)

    def tensors():
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    def step():  # what is recomputed stops as soon as all is there again
        x = torch.randn(4, 7, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer.zero_grad()

    step()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        step()
        assert tensors() == before
    finally:
        gc.enable()


class TestChoice:
    def merges(self, tokens, out=64, inner=32, dtype=torch.float32, computed=None):
        layer = relora.register_low_rank(nn.Linear(inner, out, dtype=dtype), rank=2)
        x = torch.randn(tokens, inner, dtype=dtype)
        with (
            mock.patch.object(linear, "MERGED_FROM", 4),
            mock.patch.object(linear, "MergedLinear") as merged,
            torch.autocast("cpu", dtype=computed, enabled=computed is not None),
        ):
            merged.apply.side_effect = MergedLinear.apply
            layer(x)
        return merged.apply.called

    def test_many_tokens_over_a_weight_in_full_precision_are_merged(self):
        assert not self.merges(85)  # 4 * 64 * 32 / (64 + 32) = 85.3
        assert self.merges(86)
        assert self.merges(86, dtype=torch.float64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_weight_of_sixteen_bits_never_is(self, dtype):
        """Rounding W + s B A to W's own grid drops what is less than half of its last place."""
        assert not self.merges(10_000, dtype=dtype)

    def test_under_autocast_none_is(self):
        assert not self.merges(10_000, computed=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_the_merged_form_a_restart_changes_no_bit(dtype, form):
    layer = low_rank_layer(24, 40, 6, dtype=dtype)
    site = relora.Site(layer, "weight")
    x = torch.randn(64, 40, dtype=dtype)
    before = layer(x)
    relora.restart_(layer, torch.optim.AdamW([site.lora_A, site.lora_B]))
    assert torch.equal(layer(x), before) is (form == "merged")


class TestTorchFunc:
    """torch.func sees plain operations, so every transform that a plain linear allows works."""

    def call(self, layer, **changed):
        named = {n: p.detach() for n, p in layer.named_parameters()} | changed
        return lambda x: torch.func.functional_call(layer, named, (x,))

    def test_an_ensemble_of_adapters_is_mapped_over_one_weight(self):
        layer = low_rank_layer()
        x = torch.randn(4, 7, dtype=torch.float64)
        A, B = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((3, 7), (5, 3)))
        names = [f"parametrizations.weight.0.lora_{which}" for which in "AB"]

        def one(a, b):
            return self.call(layer, **dict(zip(names, (a, b), strict=True)))(x)

        together = torch.func.vmap(one)(A, B)
        for index in range(3):
            torch.testing.assert_close(together[index], one(A[index], B[index]))

    def test_forward_mode_agrees_with_reverse_mode(self):
        layer = low_rank_layer()
        x = torch.randn(7, dtype=torch.float64)
        apply = self.call(layer)
        torch.testing.assert_close(torch.func.jacfwd(apply)(x), torch.func.jacrev(apply)(x))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        torch.testing.assert_close(tangent, torch.func.jacrev(apply)(x).sum(1))

    def test_a_hessian_is_that_of_the_dense_sum(self):
        layer = low_rank_layer()
        plain, _ = dense_twin(layer)
        x = torch.randn(7, dtype=torch.float64)
        cubed = [lambda x, f=f: f(x).pow(3).sum() for f in (self.call(layer), plain)]
        ours, dense = (torch.func.hessian(f)(x) for f in cubed)
        torch.testing.assert_close(ours, dense)


class TestCompiled:
    def graphs(self, layer, x):
        found = []

        def keep(graph, inputs):
            found.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
            return graph

        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        compiled(x).sum().backward()
        return found

    @pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning")
    def test_the_sum_is_one_operator_and_nothing_is_copied_or_multiplied_by_one(self):
        layer = relora.register_low_rank(nn.Linear(8, 6, bias=False), rank=2).bfloat16()
        x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
        forward, backward = self.graphs(layer, x)
        for graph, products in ((forward, 1), (backward, 3)):  # u; h, dA and dB
            assert graph.count("relora.sum_of_products.default") == 1
            assert graph.count("aten.mm.default") == products
            others = {name.split(".")[1] for name in graph} - {"mm", "sum_of_products"}
            assert others <= {"permute", "view", "t", "expand", "_unsafe_view"}

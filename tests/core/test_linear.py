"""The two-path linear: equal to the dense sum, at the cost of the two paths."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import relora_core as relora
from tests.reference import dense_twin, randomize_


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


class TestCost:
    T, M, N, R = 4096, 2048, 2048, 128

    def flops(self, layer):
        x = torch.empty(self.T, self.N, device="meta", requires_grad=True)
        # torch's counter leaves out the in-place addmm_: count it as addmm.
        extra = {torch.ops.aten.addmm_: lambda y, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=extra) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops()

    def test_two_paths_cost_what_the_formula_says(self):
        layer = nn.Linear(self.N, self.M, bias=False, device="meta")
        full = self.flops(layer)
        assert full == 6 * self.T * self.M * self.N
        low_rank = self.flops(relora.register_low_rank(layer, rank=self.R))
        two_paths = 4 * self.T * self.M * self.N + 6 * self.T * self.R * (self.M + self.N)
        assert low_rank == two_paths
        assert low_rank / full <= 0.80

    def test_a_dense_parametrization_costs_more_than_full_rank(self):
        layer = nn.Linear(self.N, self.M, bias=False)
        full = self.flops(nn.Linear(self.N, self.M, bias=False, device="meta"))
        relora.register_low_rank(layer, rank=self.R)
        plain, _ = dense_twin(layer)
        assert self.flops(plain.to("meta")) / full >= 1.0

    def test_no_tensor_of_the_weight_s_size_is_made(self):
        layer = relora.register_low_rank(nn.Linear(64, 48, bias=False), rank=4)
        made = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                outs = out if isinstance(out, tuple | list) else [out]
                weight = relora.Site(layer, "weight").weight
                for one in outs:
                    if isinstance(one, torch.Tensor) and one.numel() == weight.numel():
                        made.append(one.data_ptr() == weight.data_ptr())
                return out

        x = torch.randn(5, 64, requires_grad=True)
        with Watch():
            layer(x).sum().backward()
        assert all(made)  # views of W itself only
        with Watch():
            F.linear(x, layer.weight.materialize()).sum().backward()
        assert not all(made)  # the watch does see a dense weight

"""The restart: the function stays, the rank grows, everything or nothing happens."""

import copy
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import relora_core as relora
from relora_core.optim import radix_select as selection
from tests.core.models import RANK, training
from tests.reference import randomize_, ulp


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (8, 6), generator=generator)
    logits = model(tokens[:, :-1]).flatten(0, 1).float()
    nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("compute", [torch.float64, torch.float32, torch.bfloat16])
def test_the_function_stays_to_two_units_of_the_last_place(compute):
    """Of the compute dtype, at the largest output; weights are stored in fp32 or wider.

    In fp32 and fp64 thirty tokens are enough for the merged form, and no bit changes.
    """
    model, optimizer = training(torch.promote_types(compute, torch.float32))
    tokens = torch.randint(0, 11, (6, 5))
    for cycle in range(3):
        for index in range(5):
            step(model, optimizer, 10 * cycle + index)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
            before = model(tokens)
            relora.restart_(model, optimizer)
            after = model(tokens)
        assert before.dtype == compute
        unit = ulp(torch.maximum(before.abs(), after.abs()).max())
        assert (after - before).abs().max() <= (2 * unit if compute == torch.bfloat16 else 0)


@given(data=st.data())
def test_every_output_of_a_layer_in_bf16_stays_to_two_units_of_the_last_place(data):
    """Every single output, whatever the weights, which are stored in fp32.

    A unit is counted at the magnitude of what is summed, (|x| (|W| + s |B| |A|)ᵀ)ᵢ: where a sum
    cancels, its last place is not the place in which its terms were rounded.
    """
    out, inner, tokens = (data.draw(st.integers(1, 65)) for _ in range(3))
    rank = data.draw(st.integers(1, min(out, inner)))
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    layer = relora.register_low_rank(
        nn.Linear(inner, out, bias=False), rank=rank, alpha=data.draw(st.floats(1, 9))
    )
    randomize_(layer, std=data.draw(st.sampled_from([1e-3, 0.1, 1.0])))
    site = relora.Site(layer, "weight")
    x = torch.randn(tokens, inner)
    with torch.no_grad():
        magnitude = site.weight.abs() + site.scale * site.lora_B.abs() @ site.lora_A.abs()
        unit = torch.finfo(torch.bfloat16).eps * (x.abs() @ magnitude.T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = layer(x)
            relora.restart_(layer, torch.optim.AdamW([site.lora_A, site.lora_B]))
            after = layer(x)
    assert before.dtype == torch.bfloat16
    assert ((after - before).abs() <= 2 * unit).all()


def test_in_exact_arithmetic_the_function_stays_to_two_units_of_fp32():
    """The merge's own error, without that of the forward passes: both are run in float64."""
    model, optimizer = training()
    tokens = torch.randint(0, 11, (6, 5))
    for cycle in range(3):
        for index in range(5):
            step(model, optimizer, 10 * cycle + index)
        before = copy.deepcopy(model).double()(tokens)
        relora.restart_(model, optimizer)
        after = copy.deepcopy(model).double()(tokens)
        assert (after - before).abs().max() <= 2 * ulp(before.abs().max().float())


def test_rank_grows_with_each_restart_and_within_its_bound():
    model, optimizer = training(torch.float64)
    sites = dict(relora.low_rank_sites(model))
    first = {name: site.weight.detach().clone() for name, site in sites.items()}
    for k in (1, 2, 3):
        for index in range(10):
            step(model, optimizer, 100 * k + index)
        relora.restart_(model, optimizer)
        for name, site in sites.items():
            rank = torch.linalg.matrix_rank(site.weight.detach() - first[name]).item()
            assert rank <= k * RANK
            if k > 1:
                assert rank > RANK


def test_every_factor_learns_in_every_cycle():
    model, optimizer = training()
    for cycle in range(3):
        factors = {
            (name, which): getattr(site, which).detach().clone()
            for name, site in relora.low_rank_sites(model)
            for which in ("lora_A", "lora_B")
        }
        for index in range(3):
            step(model, optimizer, 10 * cycle + index)
        for name, site in relora.low_rank_sites(model):
            for which in ("lora_A", "lora_B"):
                assert not torch.equal(getattr(site, which), factors[name, which])
        relora.restart_(model, optimizer)


def test_the_report_says_exactly_what_was_done():
    model, optimizer = training()
    step(model, optimizer, 0)
    sites = dict(relora.low_rank_sites(model))
    norms = {n: (s.scale * s.lora_B @ s.lora_A).norm().item() for n, s in sites.items()}
    report = relora.restart_(model, optimizer, prune_ratio=0.7)
    assert report.update_norms == pytest.approx(norms, rel=1e-4)
    assert report.sites == len(sites)
    moments = [
        optimizer.state[p][key]
        for site in sites.values()
        for p in (site.lora_A, site.lora_B)
        for key in ("exp_avg", "exp_avg_sq")
    ]
    assert report.reset.entries == sum(m.numel() for m in moments)
    assert report.reset.zeroed == sum(math.floor(0.7 * (m.numel() - 1)) + 1 for m in moments)
    assert report.zeroed_fraction == report.reset.zeroed / report.reset.entries
    assert all(int((m == 0).sum()) >= math.floor(0.7 * (m.numel() - 1)) + 1 for m in moments)


def test_only_the_sites_and_their_moments_change():
    model, optimizer = training()
    step(model, optimizer, 0)
    rest = [p for n, p in model.named_parameters() if "parametrizations" not in n]
    before = [p.detach().clone() for p in rest]
    states = [copy.deepcopy(optimizer.state[p]) for p in rest]
    counters = {p: optimizer.state[p]["step"].clone() for p in optimizer.state}
    relora.restart_(model, optimizer)
    for p, value, state in zip(rest, before, states, strict=True):
        assert torch.equal(p, value)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)
    assert all(torch.equal(optimizer.state[p]["step"], c) for p, c in counters.items())


def _nan_in_a(model, optimizer):
    with torch.no_grad():
        dict(relora.low_rank_sites(model))["layers.1.mlp.up"].lora_A[0, 0] = math.nan


def _inf_in_b(model, optimizer):
    with torch.no_grad():
        dict(relora.low_rank_sites(model))["layers.0.mlp.up"].lora_B[0, 0] = math.inf


def _nan_in_a_moment(model, optimizer):
    site = dict(relora.low_rank_sites(model))["layers.1.mlp.up"]
    optimizer.state[site.lora_B]["exp_avg_sq"][0, 0] = math.nan


def _a_copy_of_another_shape(model, optimizer):
    class Averaged(torch.optim.SGD):
        pass

    relora.declare_moments(Averaged, ["momentum_buffer"], copies=["average"], clock={})
    site = dict(relora.low_rank_sites(model))["layers.1.mlp.up"]
    inner = Averaged([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for p in inner.param_groups[0]["params"]:
        inner.state[p] = {"momentum_buffer": torch.ones_like(p), "average": p.detach().clone()}
    inner.state[site.lora_B]["average"] = torch.ones(1, 7)
    optimizer.inner = inner


def _a_split_base_is_converted(model, optimizer):
    relora.split_bases_(model)
    model.layers[1].float()


@pytest.mark.parametrize(
    ("break_", "options", "message"),
    [
        (_a_copy_of_another_shape, {}, "a copy must be a tensor of its parameter's shape"),
        (_a_split_base_is_converted, {}, "layers.1.*a split W must stay bfloat16"),
        (_nan_in_a, {}, r"1 sites is not finite \(first: layers.1.mlp.up\)"),
        (_inf_in_b, {}, r"first: layers.0.mlp.up"),
        (_nan_in_a_moment, {}, "moments hold NaN"),
        (lambda *_: None, {"prune_ratio": -0.1}, "prune_ratio must be between 0 and 1"),
        (lambda *_: None, {"masks": "each"}, "masks must be"),
    ],
)
def test_a_refused_restart_changes_nothing(break_, options, message):
    model, optimizer = training()
    step(model, optimizer, 0)
    break_(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        relora.restart_(model, optimizer, **options)
    assert str(everything(model, optimizer)) == str(before)


def test_another_default_device_changes_nothing():
    model, optimizer = training()
    step(model, optimizer, 0)
    twin, other = copy.deepcopy((model, optimizer))
    with torch.device("meta"):
        report = relora.restart_(model, optimizer)
    assert report == relora.restart_(twin, other)
    assert str(everything(model, optimizer)) == str(everything(twin, other))


def test_an_optimizer_without_the_factors_is_refused():
    model, _ = training()
    other = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="12 of 12 parameters are not in the optimizer"):
        relora.restart_(model, other)


def test_a_merge_that_could_overflow_float16_is_refused():
    model = relora.add_low_rank_(nn.Sequential(nn.Linear(8, 8, dtype=torch.float16)), "0", rank=2)
    site = dict(relora.low_rank_sites(model))["0"]
    with torch.no_grad():
        site.lora_A.fill_(300)
        site.lora_B.fill_(300)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="store W in float32 or bfloat16"):
        relora.restart_(model, optimizer)
    assert str(model.state_dict()) == str(before)


def test_inside_autocast_it_measures_in_full_precision():
    model, optimizer = training()
    step(model, optimizer, 0)
    with torch.no_grad():
        for _, site in relora.low_rank_sites(model):
            site.lora_B.fill_(200)
    twin, other = copy.deepcopy((model, optimizer))
    with torch.autocast("cpu", dtype=torch.float16):
        inside = relora.restart_(model, optimizer)
    assert inside == relora.restart_(twin, other)


@pytest.mark.parametrize("layers", [1, 7])
def test_the_host_waits_as_often_for_many_sites_as_for_one(layers):
    """Three times: for NaN, gradients and norms. On a device entries are selected by sorting."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    relora.add_low_rank_(model, "*", rank=2)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    waits = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "bincount"):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    def tolist(tensor):
        waits.append(tensor.shape)
        return torch._C.TensorBase.tolist(tensor)

    with (
        mock.patch.object(selection, "_by_counting", selection._by_sorting),
        mock.patch.object(torch.Tensor, "tolist", tolist),
        Watch(),
    ):
        relora.restart_(model, optimizer)
    assert waits == [(1,), (layers,), (layers,)]


def test_a_frozen_site_needs_no_optimizer():
    model, _ = training()
    model.layers[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert relora.restart_(model, torch.optim.AdamW(trained)).sites == 6


def test_a_first_restart_without_optimizer_state_is_fine():
    model, optimizer = training()
    assert relora.restart_(model, optimizer).reset.entries == 0

"""On a GPU: the draws and merges of the CPU, kernels, capture, scaling."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import relora_core as relora
from tests.core.models import TARGETS, Model, training
from tests.reference import dense_twin, randomize_

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # What torch says of itself: of the mode that counts waits, of the first backward of a process,
    # and, compiling, of products in fp32.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix"),
]


def test_draws_and_merges_are_those_of_the_cpu():
    on_cpu = relora.add_low_rank_(Model(), TARGETS, rank=3, alpha=6.0)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    with torch.device("cuda"):
        there = relora.add_low_rank_(Model(), TARGETS, rank=3, alpha=6.0)
    for _ in range(2):
        for (_, a), (_, b), (_, c) in zip(
            relora.low_rank_sites(on_cpu),
            relora.low_rank_sites(on_gpu),
            relora.low_rank_sites(there),
            strict=True,
        ):
            assert torch.equal(a.lora_A, b.lora_A.cpu())
            assert torch.equal(a.lora_A, c.lora_A.cpu())
            with torch.no_grad():
                b.lora_B.copy_(nn.init.normal_(a.lora_B, std=0.1))
        relora.merge_(on_cpu)
        relora.merge_(on_gpu)
        for (_, a), (_, b) in zip(
            relora.low_rank_sites(on_cpu), relora.low_rank_sites(on_gpu), strict=True
        ):
            torch.testing.assert_close(a.weight, b.weight.cpu())
        for model in (on_cpu, on_gpu, there):
            relora.reinit_(model)


def test_spectra_are_those_of_the_cpu():
    models = [relora.add_low_rank_(Model(), TARGETS, rank=3, alpha=6.0)]
    models.append(copy.deepcopy(models[0]).cuda())
    optimizers = [
        torch.optim.SGD(p for p in model.parameters() if p.requires_grad) for model in models
    ]
    on_cpu, on_gpu = spectra = [relora.UpdateSpectra(model) for model in models]
    for _ in range(4):  # more directions than some have
        randomize_(models[0])
        for (_, a), (_, b) in zip(*map(relora.low_rank_sites, models), strict=True):
            with torch.no_grad():
                b.lora_A.copy_(a.lora_A)
                b.lora_B.copy_(a.lora_B)
        for model, optimizer, each in zip(models, optimizers, spectra, strict=True):
            each.keep_()
            relora.restart_(model, optimizer)
    expected, found = on_cpu.measure(), on_gpu.measure()
    assert expected.keys() == found.keys()
    for name, spectrum in found.items():
        assert spectrum.values.device.type == "cpu"
        torch.testing.assert_close(spectrum.values, expected[name].values, atol=1e-4, rtol=1e-5)


def test_pruning_is_that_of_the_cpu():
    for shape in ((128, 2048), (2048, 128), (7,)):
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.randn(shape).to(dtype)
            pruned = relora.magnitude_prune_(tensor.cuda(), ratio=0.99)
            assert torch.equal(pruned.cpu(), relora.magnitude_prune_(tensor.clone(), ratio=0.99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_two_paths_agree_with_float64(dtype, compiled):
    layer = relora.register_low_rank(nn.Linear(256, 192, device="cuda"), rank=16, alpha=32)
    randomize_(layer, std=0.05)
    plain, dense = dense_twin(layer)
    plain.double()
    layer.to(dtype)
    x = torch.randn(512, 256, device="cuda")
    g = torch.randn(512, 192, device="cuda")
    apply = torch.compile(layer, fullgraph=True) if compiled else layer
    y, expected = apply(x.to(dtype)), plain(x.double())
    y.backward(g.to(dtype))
    expected.backward(g.double())
    tolerance = 50 * torch.finfo(dtype).eps
    site = relora.Site(layer, "weight")
    for ours, exact in (
        (y, expected),
        (site.lora_A.grad, dense.lora_A.grad),
        (site.lora_B.grad, dense.lora_B.grad),
    ):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"foreach": True}])
def test_a_restart_works_with_every_kind_of_adamw(options):
    model, _ = training()
    model.cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = relora.ResettableOptimizer(torch.optim.AdamW(trained, lr=1e-2, **options))
    tokens = torch.randint(0, 11, (4, 5), device="cuda")
    for _ in range(3):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(tokens)
    report = relora.restart_(model, optimizer)
    torch.testing.assert_close(model(tokens), before)
    zeros = sum(
        int((optimizer.state[p][key] == 0).sum())
        for _, site in relora.low_rank_sites(model)
        for p in (site.lora_A, site.lora_B)
        for key in ("exp_avg", "exp_avg_sq")
    )
    assert zeros >= report.reset.zeroed > 0


def test_a_restart_waits_for_the_device_as_often_for_many_sites_as_for_one():
    counts = []
    for layers in (1, 7):
        model = nn.Sequential(*(nn.Linear(64, 64, device="cuda") for _ in range(layers)))
        relora.add_low_rank_(model, "*", rank=4)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(torch.randn(3, 64, device="cuda")).sum().backward()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                relora.restart_(model, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len([w for w in caught if "synchronizing" in str(w.message)]))
    assert counts == [2, 2]


def test_a_grad_scaler_skips_infinite_steps_through_the_wrapper():
    p = nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = relora.ResettableOptimizer(torch.optim.AdamW([p], fused=True))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for factor, moves in ((math.inf, False), (1.0, True)):
        before = p.detach().clone()
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) is not moves


def test_the_forward_and_backward_can_be_captured():
    layer = relora.register_low_rank(nn.Linear(64, 64, device="cuda"), rank=8)
    randomize_(layer)
    x = torch.randn(16, 64, device="cuda")
    captured = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x,))
    torch.testing.assert_close(captured(x), layer(x))


def test_merged_copies_are_those_of_the_cpu_after_steps_and_restarts():
    model, optimizer = training()
    relora.keep_merged_(model)
    there = copy.deepcopy(model).cuda()
    relora.keep_merged_(there)
    x = torch.randint(0, 11, (4, 5))
    for one, tokens in ((model, x), (there, x.cuda())):
        trained = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            one(tokens).float().square().mean().backward()
        optimizer.step()
        for _, site in relora.low_rank_sites(one):
            V = torch.add(site.weight, site.lora_B @ site.lora_A, alpha=site.scale).bfloat16()
            kept = site.low_rank.merged_copy
            assert kept is not None
            assert torch.equal(kept[:, : V.shape[1]], V)
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16):
            before = one(tokens)
            relora.restart_(one, optimizer)
            assert torch.equal(one(tokens), before)


@pytest.mark.parametrize("kept", [False, True], ids=["two paths", "merged copies"])
def test_a_compiled_block_trains_as_an_eager_one(kept):
    layer = relora.register_low_rank(nn.Linear(64, 48, device="cuda"), rank=8, alpha=4.0)
    randomize_(layer)
    model = nn.Sequential(layer)
    if kept:
        relora.keep_merged_(model)
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    found = []
    for run in (model, torch.compile(model)):
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(x).float().square().mean()
        asked = (
            x,
            layer.parametrizations.weight[0].lora_A,
            layer.parametrizations.weight[0].lora_B,
        )
        found.append([loss, *torch.autograd.grad(loss, asked)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=1e-3)

"""Resets: their rules and refusals. What each optimizer needs is in the table of optimizers."""

import importlib
import math

import pytest
import torch
from torch import nn

import relora_core as relora
from relora_core.optim import state_layouts
from tests.core.optim.optimizers import ADAM, Row, raw, stepped
from tests.reference import dropped


def adamw(steps=3, **options):
    optimizer, model = stepped(Row("torch.optim.AdamW", options, ADAM), steps=steps)
    return optimizer, list(model.parameters())


def moments_of(optimizer, p):
    return {key: optimizer.state[p][key] for key in ADAM}


def snapshot(optimizer):
    return raw(optimizer.state_dict())


def test_independent_masks_prune_each_moment_by_itself():
    optimizer, params = adamw()
    want = {
        key: relora.magnitude_prune_(value.clone(), ratio=0.8)
        for key, value in moments_of(optimizer, params[0]).items()
    }
    relora.reset_optimizer_(optimizer, params[:1], prune_ratio=0.8, masks="independent")
    for key, value in moments_of(optimizer, params[0]).items():
        assert torch.equal(value, want[key])


def test_a_joint_mask_leaves_no_momentum_over_a_zero_second_moment():
    for masks, safe in (("joint", True), ("independent", False)):
        optimizer, params = adamw(steps=5)
        relora.reset_optimizer_(optimizer, params, prune_ratio=0.9, masks=masks)
        state = optimizer.state[params[0]]
        stray = (state["exp_avg"] != 0) & (state["exp_avg_sq"] == 0)
        assert bool(stray.any()) is not safe


class TestRandomRule:
    def masks(self, **options):
        optimizer, params = adamw()
        report = relora.reset_optimizer_(
            optimizer, params, prune_ratio=0.8, rule="random", **options
        )
        values = [m for p in params for m in moments_of(optimizer, p).values()]
        assert report.zeroed == sum(int((value == 0).sum()) for value in values)
        assert report.zeroed == 2 * (dropped(30, 0.8) + dropped(7, 0.8))
        return [(value == 0).flatten().tolist() for value in values]

    def test_depends_on_the_seed_alone(self):
        first = self.masks(seed=3)
        torch.rand(5)
        assert self.masks(seed=3) == first
        assert self.masks(seed=4) != first

    def test_masks_are_joint_or_each_moment_s_own(self):
        m, v, *_ = self.masks()
        assert m == v
        m, v, *_ = self.masks(masks="independent")
        assert m != v

    def test_leaves_the_global_generator_alone(self):
        state = torch.get_rng_state()
        self.masks()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        adamw()
        assert torch.equal(torch.get_rng_state(), after)


class TestStepReset:
    def test_with_a_full_reset_the_next_update_is_the_very_first(self):
        optimizer, params = adamw(steps=50, weight_decay=0.0)
        relora.reset_optimizer_(optimizer, params, prune_ratio=1.0, reset_step=True)
        before = params[0].detach().clone()
        params[0].grad = torch.randn_like(params[0])
        optimizer.step()
        expected = before - 1e-2 * params[0].grad.sign()
        torch.testing.assert_close(params[0].detach(), expected, atol=1e-6, rtol=1e-5)


def test_a_declared_optimizer_is_reset(monkeypatch):
    monkeypatch.setattr(state_layouts, "_declared", {})

    class Averaging(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["average"] = state.get("average", 0) + p.grad
                    state["count"] = state.get("count", 0) + 1

    p = nn.Parameter(torch.randn(6, 5))
    optimizer = Averaging([p], lr=1e-2)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    params = [p]
    with pytest.raises(ValueError, match=r"\['average', 'count'\]"):
        relora.reset_optimizer_(optimizer, params)
    relora.declare_moments(Averaging, ["average"], others=["count"])
    assert relora.reset_optimizer_(optimizer, params, prune_ratio=1.0).zeroed == 30
    assert optimizer.state[params[0]]["count"] == 3
    relora.declare_moments(Averaging, ["average"], others=[])
    with pytest.raises(ValueError, match=r"keeps states \['count'\]"):
        relora.reset_optimizer_(optimizer, params)


def test_a_declared_copy_follows_the_parameter_that_a_restart_redraws(monkeypatch):
    monkeypatch.setattr(state_layouts, "_declared", {})

    class WithMaster(torch.optim.SGD):
        """Steps a copy in fp32, and rounds it to the parameter."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                master = state.setdefault("master", p.detach().float())
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(master))
                momentum.mul_(0.9).add_(p.grad)
                master.sub_(momentum, alpha=self.param_groups[0]["lr"])
                p.data.copy_(master)

    model = nn.Sequential(nn.Linear(5, 6, dtype=torch.bfloat16))
    relora.add_low_rank_(model, "0", rank=3)
    (_, site), *_ = relora.low_rank_sites(model)
    optimizer = WithMaster([site.lora_A, site.lora_B], lr=1e-2)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 5, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()

    step()
    with pytest.raises(ValueError, match=r"keeps states \['master'\]"):
        relora.restart_(model, optimizer)
    relora.declare_moments(WithMaster, ["momentum_buffer"], copies=["master"], clock={})
    relora.restart_(model, optimizer, prune_ratio=1.0)
    drawn = site.lora_A.detach().clone()
    for p in (site.lora_A, site.lora_B):
        assert torch.equal(optimizer.state[p]["master"], p.detach().float())
    step()  # B is zero, so A's gradient is: only a stale copy could move A
    assert torch.equal(site.lora_A, drawn)


@pytest.mark.parametrize("path", [*state_layouts.FOREIGN, *state_layouts.REFUSED])
def test_a_class_known_by_name_is_where_the_table_says(path):
    module, _, name = path.rpartition(".")
    library = path.split(".")[0]
    pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)
    cls = getattr(importlib.import_module(module), name)
    assert f"{cls.__module__}.{cls.__qualname__}" == path


def test_an_optimizer_of_copies_in_host_memory_is_refused():
    """torchao's, which needs a GPU to be made: a class of its name stands for it."""

    class Offloaded(torch.optim.SGD):
        pass

    Offloaded.__module__, Offloaded.__qualname__ = (
        "torchao.optim.cpu_offload",
        "CPUOffloadOptimizer",
    )
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="steps copies of the parameters in host memory"):
        relora.reset_optimizer_(Offloaded([p]), [p])


@pytest.mark.parametrize("averaged", [False, True])
def test_schedule_free_goes_on_from_the_redrawn_factors(averaged):
    """Merged as they stand: the averaged ones in its evaluation mode."""
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model = relora.add_low_rank_(nn.Sequential(nn.Linear(5, 6)), "0", rank=3)
    (_, site), *_ = relora.low_rank_sites(model)
    optimizer = schedulefree.AdamWScheduleFree([site.lora_A, site.lora_B], lr=1e-2)
    optimizer.train()
    x = torch.randn(4, 5)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(5):
        step()
    if averaged:
        optimizer.eval()
    before = model(x)
    relora.restart_(model, optimizer, prune_ratio=1.0)
    torch.testing.assert_close(model(x), before)
    optimizer.train()
    drawn = site.lora_A.detach().clone()
    assert not site.lora_B.any()
    step()  # B was zero, so A's gradient was: only an old z could move it
    assert torch.equal(site.lora_A, drawn)
    assert site.lora_B.any()


def test_declaring_nonsense_is_refused():
    with pytest.raises(TypeError, match="Optimizer subclass"):
        relora.declare_moments(dict, ["a"])
    with pytest.raises(ValueError, match="moments must name a key of the optimizer's state"):
        relora.declare_moments(torch.optim.SGD, [])


@pytest.mark.parametrize(
    ("break_", "options", "message"),
    [
        (lambda o, p: None, {"prune_ratio": 1.1}, "prune_ratio must be between 0 and 1; got 1.1"),
        (lambda o, p: None, {"masks": "both"}, "masks must be 'joint' or 'independent'"),
        (lambda o, p: None, {"rule": "size"}, "rule must be 'magnitude' or 'random'"),
        (lambda o, p: p.append(nn.Parameter(torch.ones(2))), {}, "1 of 3 parameters are not in"),
        (lambda o, p: o.state[p[1]]["exp_avg_sq"].fill_(math.nan), {}, "moments hold NaN"),
    ],
)
def test_a_refused_reset_changes_nothing(break_, options, message):
    optimizer, params = adamw()
    break_(optimizer, params)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        relora.reset_optimizer_(optimizer, params, **options)
    assert snapshot(optimizer) == before

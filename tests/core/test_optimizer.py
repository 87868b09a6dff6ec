"""Resets: every known optimizer, exact counts, nothing else touched."""

import copy
import math

import pytest
import torch
from torch import nn

import relora_core as relora

OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
}
REFUSED = {
    "ASGD": (torch.optim.ASGD, {}),
    "Rprop": (torch.optim.Rprop, {}),
}


def stepped(make, options, steps=3, params=None):
    torch.manual_seed(1)
    params = params or [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(7))]
    optimizer = make(params, lr=1e-2, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, params


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def moments_of(optimizer, p):
    keep = {"step", "mu_product"}
    return {k: v for k, v in optimizer.state.get(p, {}).items() if k not in keep and v is not None}


@pytest.mark.parametrize("kind", OPTIMIZERS)
class TestReset:
    def test_zeroes_exactly_what_it_reports_and_keeps_the_rest(self, kind):
        optimizer, params = stepped(*OPTIMIZERS[kind])
        before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
        report = relora.reset_optimizer_(optimizer, params[:1], prune_ratio=0.9)
        moments = moments_of(optimizer, params[0])
        dropped = math.floor(0.9 * 29) + 1
        assert report.entries == 30 * len(moments)
        assert report.zeroed == dropped * len(moments)
        masks = set()
        for key, value in moments.items():
            kept = value != 0
            assert int(kept.sum()) == 30 - dropped
            assert torch.equal(value[kept], before[params[0]][key][kept])
            masks.add(tuple(kept.flatten().tolist()))
        assert len(masks) <= 1  # one joint mask
        for key in set(optimizer.state.get(params[0], {})) - set(moments):
            assert optimizer.state[params[0]][key] == before[params[0]][key]
        for key, value in optimizer.state.get(params[1], {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[params[1]][key]))

    def test_ratio_one_zeroes_all(self, kind):
        optimizer, params = stepped(*OPTIMIZERS[kind])
        relora.reset_optimizer_(optimizer, params, prune_ratio=1.0)
        assert not any(v.any() for p in params for v in moments_of(optimizer, p).values())

    def test_without_state_nothing_is_reported_or_made(self, kind):
        optimizer, params = stepped(*OPTIMIZERS[kind], steps=0)
        before = dict(optimizer.state)
        report = relora.reset_optimizer_(optimizer, params)
        if kind != "Adagrad":  # it makes its state at construction
            assert (report.entries, report.zeroed, report.zeroed_fraction) == (0, 0, 0.0)
        assert optimizer.state.keys() == before.keys()


def test_independent_masks_prune_each_moment_by_itself():
    optimizer, params = stepped(torch.optim.AdamW, {})
    want = {
        key: relora.magnitude_prune_(value.clone(), ratio=0.8)
        for key, value in moments_of(optimizer, params[0]).items()
    }
    relora.reset_optimizer_(optimizer, params[:1], prune_ratio=0.8, masks="independent")
    for key, value in moments_of(optimizer, params[0]).items():
        assert torch.equal(value, want[key])


def test_a_joint_mask_leaves_no_momentum_over_a_zero_second_moment():
    for masks, safe in (("joint", True), ("independent", False)):
        optimizer, params = stepped(torch.optim.AdamW, {}, steps=5)
        relora.reset_optimizer_(optimizer, params, prune_ratio=0.9, masks=masks)
        state = optimizer.state[params[0]]
        stray = (state["exp_avg"] != 0) & (state["exp_avg_sq"] == 0)
        assert bool(stray.any()) is not safe


@pytest.mark.parametrize("kind", REFUSED)
def test_an_optimizer_whose_state_is_no_average_is_refused_with_the_reason(kind):
    optimizer, params = stepped(*REFUSED[kind])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"{kind} cannot be reset: its `\w+` is"):
        relora.reset_optimizer_(optimizer, params)
    assert str(snapshot(optimizer)) == str(before)


class TestFactoredStatistics:
    """No entry of a parameter owns a row's or a column's statistic: all go, or none."""

    def test_pruning_them_is_refused(self):
        optimizer, params = stepped(torch.optim.Adafactor, {})
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=r"factored statistics.*got prune_ratio=0.99: give 1"):
            relora.reset_optimizer_(optimizer, params)
        assert str(snapshot(optimizer)) == str(before)

    def test_a_full_reset_zeroes_them(self):
        optimizer, params = stepped(torch.optim.Adafactor, {})
        report = relora.reset_optimizer_(optimizer, params, prune_ratio=1.0)
        state = optimizer.state[params[0]]
        assert not state["row_var"].any()
        assert not state["col_var"].any()
        assert report.entries == report.zeroed == 6 + 5 + 7
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all(p.isfinite().all() for p in params)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon_s_momentum_is_pruned():
    optimizer, params = stepped(torch.optim.Muon, {}, params=[nn.Parameter(torch.randn(6, 5))])
    report = relora.reset_optimizer_(optimizer, params, prune_ratio=0.9)
    momentum = optimizer.state[params[0]]["momentum_buffer"]
    assert int((momentum == 0).sum()) == report.zeroed == math.floor(0.9 * 29) + 1


class TestRandomRule:
    def masks(self, **options):
        optimizer, params = stepped(torch.optim.AdamW, {})
        report = relora.reset_optimizer_(
            optimizer, params, prune_ratio=0.8, rule="random", **options
        )
        values = [m for p in params for m in moments_of(optimizer, p).values()]
        assert report.zeroed == sum(int((value == 0).sum()) for value in values)
        assert report.zeroed == 2 * (math.floor(0.8 * 29) + 1 + math.floor(0.8 * 6) + 1)
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
        stepped(torch.optim.AdamW, {})
        assert torch.equal(torch.get_rng_state(), after)


class TestStepReset:
    @pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if "SGD" not in k])
    def test_begins_the_count_of_the_given_parameters_anew(self, kind):
        optimizer, params = stepped(*OPTIMIZERS[kind])
        count = torch.as_tensor(optimizer.state[params[1]]["step"]).clone()
        relora.reset_optimizer_(optimizer, params[:1], reset_step=True)
        assert optimizer.state[params[0]]["step"] == 0
        assert optimizer.state[params[1]]["step"] == count == 3
        if kind == "NAdam":
            assert optimizer.state[params[0]]["mu_product"] == 1
            assert optimizer.state[params[1]]["mu_product"] != 1

    def test_with_a_full_reset_the_next_update_is_the_very_first(self):
        optimizer, params = stepped(torch.optim.AdamW, {"weight_decay": 0.0}, steps=50)
        relora.reset_optimizer_(optimizer, params, prune_ratio=1.0, reset_step=True)
        before = params[0].detach().clone()
        params[0].grad = torch.randn_like(params[0])
        optimizer.step()
        expected = before - 1e-2 * params[0].grad.sign()
        torch.testing.assert_close(params[0].detach(), expected, atol=1e-6, rtol=1e-5)

    def test_where_no_steps_are_counted_it_is_refused(self):
        optimizer, params = stepped(torch.optim.SGD, {"momentum": 0.9})
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="counts no steps for each parameter"):
            relora.reset_optimizer_(optimizer, params, reset_step=True)
        assert str(snapshot(optimizer)) == str(before)


def test_a_declared_optimizer_is_reset(monkeypatch):
    from relora_core import moments

    monkeypatch.setattr(moments, "_LAYOUTS", dict(moments._LAYOUTS))

    class Averaging(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["average"] = state.get("average", 0) + p.grad
                    state["count"] = state.get("count", 0) + 1

    optimizer, params = stepped(Averaging, {})
    with pytest.raises(ValueError, match=r"\['average', 'count'\]"):
        relora.reset_optimizer_(optimizer, params)
    relora.declare_moments(Averaging, ["average"], others=["count"])
    assert relora.reset_optimizer_(optimizer, params, prune_ratio=1.0).zeroed == 37
    assert optimizer.state[params[0]]["count"] == 3
    relora.declare_moments(Averaging, ["average"], others=[])
    with pytest.raises(ValueError, match=r"keeps states \['count'\]"):
        relora.reset_optimizer_(optimizer, params)


def test_declaring_nonsense_is_refused():
    with pytest.raises(TypeError, match="Optimizer subclass"):
        relora.declare_moments(dict, ["a"])
    with pytest.raises(ValueError, match="moments is empty"):
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
    optimizer, params = stepped(torch.optim.AdamW, {})
    break_(optimizer, params)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        relora.reset_optimizer_(optimizer, params, **options)
    assert str(snapshot(optimizer)) == str(before)

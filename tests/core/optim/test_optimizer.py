"""The wrapper is transparent: whatever takes the inner optimizer takes it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import relora_core as relora
from tests.core.optim.optimizers import Row, raw
from tests.core.optim.optimizers import stepped as stepped_row


def stepped(name="AdamW", **options):
    optimizer, model = stepped_row(Row(f"torch.optim.{name}", options))
    return optimizer, list(model.parameters())


def test_sees_what_loading_replaces():
    inner, params = stepped()
    optimizer = relora.ResettableOptimizer(inner)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.5e-2
    assert optimizer.state is inner.state
    assert optimizer.reset_(params, prune_ratio=1.0).zeroed == 74


def test_runs_each_hook_once():
    inner, params = stepped()
    optimizer = relora.ResettableOptimizer(inner)
    optimizer._patch_step_function()  # as torch's own constructor and unpickling do
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "saved", "loading"]
    assert params


def test_survives_deepcopy_and_pickle():
    inner, _ = stepped()
    optimizer = relora.ResettableOptimizer(inner)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert raw(twin.state_dict()) == raw(optimizer.state_dict())
        for p in twin.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        twin.step()
    optimizer.step()


def test_a_closure_reaches_the_inner_one():
    inner, params = stepped("SGD")
    optimizer = relora.ResettableOptimizer(inner)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def test_a_group_added_later_is_stepped_and_reset():
    inner, _ = stepped()
    optimizer = relora.ResettableOptimizer(inner)
    late = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    assert inner.param_groups[1]["lr"] == 0.5
    late.grad = torch.ones(4)
    optimizer.step()
    assert (late < 1).all()
    assert optimizer.reset_([late], prune_ratio=1.0).zeroed == 8


def test_its_compiled_step_is_the_inner_one_s():
    ends = []
    for compiled in (False, True):
        inner, params = stepped(lr=torch.tensor(1e-2), capturable=False)
        optimizer = relora.ResettableOptimizer(inner)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for p in params:
            p.grad = torch.ones_like(p)
        step()
        optimizer.reset_(params, prune_ratio=0.9)
        step()
        ends.append(params)
    for eager, other in zip(*ends, strict=True):
        torch.testing.assert_close(eager, other)


def test_a_profile_shows_the_inner_one_s_step_once():
    inner, _ = stepped()
    optimizer = relora.ResettableOptimizer(inner)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.")]
    assert names == ["Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"]


def test_a_wrapper_around_it_is_looked_through():
    inner, params = stepped()

    class Outer(torch.optim.Optimizer):
        """As accelerate and Lightning keep theirs."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    outer = Outer(relora.ResettableOptimizer(inner))
    assert relora.reset_optimizer_(outer, params, prune_ratio=1.0).zeroed == 74


def test_what_the_inner_one_has_beyond_torch_is_reached():
    inner, _ = stepped()
    inner.train = lambda: "training"
    optimizer = relora.ResettableOptimizer(inner)
    assert optimizer.train() == "training"
    assert not hasattr(optimizer, "eval")


def test_what_is_not_an_optimizer_is_refused():
    with pytest.raises(TypeError, match="got int"):
        relora.ResettableOptimizer(3)


OPTIONS = [
    {"prune_ratio": 0.6},
    {"masks": "independent"},
    {"rule": "random", "seed": 5},
    {"reset_step": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[next(iter(o)) for o in OPTIONS])
def test_resets_as_the_function_does_and_otherwise_than_by_default(options):
    states = []
    for reset_ in (
        lambda optimizer, params: relora.ResettableOptimizer(optimizer).reset_(params, **options),
        lambda optimizer, params: relora.reset_optimizer_(optimizer, params, **options),
        relora.reset_optimizer_,
    ):
        optimizer, params = stepped()
        reset_(optimizer, params)
        states.append(optimizer.state_dict()["state"])
    one, same, default = (raw(state) for state in states)
    assert one == same
    assert one != default

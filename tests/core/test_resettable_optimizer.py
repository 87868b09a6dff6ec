"""The wrapper is transparent: whatever takes the inner optimizer takes it."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import relora_core as relora
from tests.core.test_optimizer import OPTIMIZERS, REFUSED, stepped


class TestWrapper:
    def train(self, optimizer, params, steps=6, schedule=None):
        torch.manual_seed(2)
        for _ in range(steps):
            optimizer.zero_grad()
            (params[0].square().sum() + params[1].cos().sum()).backward()
            optimizer.step()
            if schedule:
                schedule.step()

    @pytest.mark.parametrize("kind", [*OPTIMIZERS, *REFUSED, "Adafactor"])
    def test_steps_as_the_inner_one_does_bit_for_bit(self, kind):
        known = {**OPTIMIZERS, **REFUSED, "Adafactor": (torch.optim.Adafactor, {})}
        make, options = known[kind]
        results = []
        for wrap in (lambda o: o, relora.ResettableOptimizer):
            inner, params = stepped(make, options, steps=1)
            optimizer = wrap(inner)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            self.train(optimizer, params, schedule=schedule)
            results.append((params, optimizer.state_dict()))
        (plain, state), (wrapped, other) = results
        assert all(torch.equal(a, b) for a, b in zip(plain, wrapped, strict=True))
        assert str(state) == str(other)

    def test_sees_what_loading_replaces(self):
        inner, params = stepped(torch.optim.AdamW, {})
        optimizer = relora.ResettableOptimizer(inner)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        schedule.step()
        assert inner.param_groups[0]["lr"] == 0.5e-2
        assert optimizer.state is inner.state
        assert optimizer.reset_(params, prune_ratio=1.0).zeroed == 74

    def test_runs_each_hook_once(self):
        inner, params = stepped(torch.optim.AdamW, {})
        optimizer = relora.ResettableOptimizer(inner)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert calls == ["pre", "post", "saved", "loading"]
        assert params

    def test_survives_deepcopy_and_pickle(self):
        inner, _ = stepped(torch.optim.AdamW, {})
        optimizer = relora.ResettableOptimizer(inner)
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert str(twin.state_dict()) == str(optimizer.state_dict())
            for p in twin.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            twin.step()
        optimizer.step()

    def test_a_closure_and_an_added_group_reach_the_inner_one(self):
        inner, params = stepped(torch.optim.SGD, {})
        optimizer = relora.ResettableOptimizer(inner)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert len(inner.param_groups) == 2

        def closure():
            optimizer.zero_grad()
            loss = params[0].square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0

    def test_a_grad_scaler_reaches_the_inner_one(self):
        inner, params = stepped(torch.optim.AdamW, {"fused": True})
        optimizer = relora.ResettableOptimizer(inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        before = params[0].detach().clone()
        optimizer.zero_grad()
        scaler.scale(params[0].square().sum() * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0], before)  # a step with infinite gradients is skipped
        optimizer.zero_grad()
        scaler.scale(params[0].square().sum()).backward()
        scaler.step(optimizer)
        assert not torch.equal(params[0], before)
        assert not hasattr(inner, "grad_scale")

    def test_is_read_and_written_by_distributed_checkpoints(self):
        from torch.distributed.checkpoint.state_dict import (
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        def made():
            torch.manual_seed(0)
            model = nn.Linear(3, 2)
            return model, relora.ResettableOptimizer(torch.optim.AdamW(model.parameters()))

        model, optimizer = made()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        twin_model, twin = made()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about shapes of the step counter
            state = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(twin_model, twin, state)
        assert str(twin.state_dict()) == str(optimizer.state_dict())

    def test_a_wrapper_around_it_is_looked_through(self):
        inner, params = stepped(torch.optim.AdamW, {})

        class Outer(torch.optim.Optimizer):
            """As accelerate and Lightning keep theirs."""

            def __init__(self, optimizer):
                self.optimizer = optimizer

            @property
            def param_groups(self):
                return self.optimizer.param_groups

        outer = Outer(relora.ResettableOptimizer(inner))
        assert relora.reset_optimizer_(outer, params, prune_ratio=1.0).zeroed == 74

    def test_what_the_inner_one_has_beyond_torch_is_reached(self):
        inner, _ = stepped(torch.optim.AdamW, {})
        inner.train = lambda: "training"
        optimizer = relora.ResettableOptimizer(inner)
        assert optimizer.train() == "training"
        assert not hasattr(optimizer, "eval")

    def test_what_is_not_an_optimizer_is_refused(self):
        with pytest.raises(TypeError, match="got int"):
            relora.ResettableOptimizer(3)

"""Copies of factors in an optimizer are set to what a restart drew, or refused by name."""

import functools
import itertools
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import relora_core as relora
from tests.core.models import assert_untouched, backward, factors, low_rank, trained


class Lookahead(torch.optim.Optimizer):
    """Every other step goes back half the way to slow copies, in its own state."""

    def __init__(self, optimizer):
        self.optimizer, self.state, self.calls = optimizer, {}, 0
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, name, {})

    def step(self, closure=None):
        self.optimizer.step()
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state.setdefault(p, {}).setdefault("slow", p.detach().clone())
                if self.calls % 2 == 0:
                    slow.lerp_(p.detach(), 0.5)
                    p.data.copy_(slow)


class Shadowing(torch.optim.AdamW):
    """Copies of the parameters in an attribute of its own, as half of all such wrappers have."""

    def __init__(self, params, keep):
        super().__init__(params)
        every = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        self.slow_weights = keep(every)


SCHEDULE_FREE = ["AdamWScheduleFree", "ScheduleFreeWrapper", "ScheduleFreeWrapperReference"]


def schedule_free(kind, params):
    """Return an optimizer of schedulefree's, and the keys of its copies."""
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    if kind == "AdamWScheduleFree":
        optimizer, copies = schedulefree.AdamWScheduleFree(params, lr=1e-2), ("z",)
    else:
        inner = torch.optim.SGD(params, lr=1e-2, momentum=0.9)
        optimizer = getattr(schedulefree, kind)(inner)
        copies = ("z",) if kind == "ScheduleFreeWrapper" else ("x", "y", "z")
    optimizer.train()
    return optimizer, copies


@dataclass(slots=True)
class Slotted:
    slow: object

    def method(self):
        return self.slow


def decorated(function):
    return functools.wraps(function)(lambda *args: function(*args))


class TestCopies:
    def test_a_wrapper_s_own_state_is_refused_by_name(self):
        model = low_rank()
        optimizer = Lookahead(torch.optim.AdamW(trained(model)))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(
            ValueError, match=r"which of Lookahead's states \['slow'\] .* copies=\[<copies of the"
        ):
            relora.restart_(model, optimizer)

    def test_a_wrapper_s_declared_copies_are_renewed(self):
        class Declared(Lookahead):
            pass

        relora.declare_moments(Declared, [], copies=["slow"], clock={})
        model = low_rank()
        optimizer = Declared(torch.optim.AdamW(trained(model)))
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        relora.restart_(model, optimizer)
        for p in factors(model):
            assert torch.equal(optimizer.state[p]["slow"], p)

    @pytest.mark.parametrize(
        "keep",
        [
            lambda every: every,
            lambda every: {"all": tuple(itertools.chain(*every))},
            lambda every: dict(enumerate(itertools.chain(*every))),
            lambda every: deque(every),
            lambda every: {"a": {"b": [{"c": ({"d": every},)}]}},
            lambda every: SimpleNamespace(slow=every),
            lambda every: SimpleNamespace(inner=[SimpleNamespace(slow=every)]),
            lambda every: functools.partial(print, every),
            lambda every: lambda: every,
            lambda every: [nn.Parameter(p) for p in itertools.chain(*every)],
            lambda every: nn.ParameterList(itertools.chain(*every)),
            lambda every: [p.flatten() for p in itertools.chain(*every)],
            lambda every: Slotted(every),
            lambda every: decorated(decorated(lambda: every)),
            lambda every: lambda slow=every: slow,
            lambda every: Slotted.method.__get__(Slotted(every)),
        ],
    )
    def test_copies_in_an_attribute_are_refused_by_name(self, keep):
        model = low_rank()
        optimizer = Shadowing(trained(model), keep)
        assert_untouched(
            model,
            optimizer,
            lambda: relora.restart_(model, optimizer),
            match="Shadowing.slow_weights holds what looks like copies of the parameters",
        )

    def test_copies_that_a_hook_keeps_are_refused(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        slow = [p.detach().clone() for p in trained(model)]
        optimizer.register_step_post_hook(lambda *_: slow[0].add_(1))
        with pytest.raises(ValueError, match="post_hooks holds what looks like copies"):
            relora.restart_(model, optimizer)

    @pytest.mark.parametrize("padding", [0, 5, 900])
    @pytest.mark.parametrize("kind", [torch.Tensor.clone, nn.Parameter])
    def test_one_vector_of_all_is_refused(self, padding, kind):
        model = relora.add_low_rank_(
            nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70)), "*", rank=4
        )
        optimizer = torch.optim.AdamW(trained(model))
        flat = torch.cat([p.detach().flatten() for p in factors(model)])
        optimizer.flat = kind(torch.cat([flat, flat.new_zeros(padding)]))
        with pytest.raises(ValueError, match=r"AdamW.flat holds what looks like copies"):
            relora.restart_(model, optimizer)

    def test_copies_that_the_parameters_carry_are_refused(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        for p in trained(model):
            p.main_grad = torch.zeros_like(p)
        assert relora.restart_(model, optimizer).sites == 2
        for p in trained(model):
            p.main_param = p.detach().clone()
        with pytest.raises(ValueError, match=r"Parameter.main_param holds what looks like copies"):
            relora.restart_(model, optimizer)

    def test_what_lies_in_the_parameters_memory_is_none(self):
        """A redraw reaches views, and buckets that parameters are views of."""
        model = relora.add_low_rank_(
            nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70)), "*", rank=4
        )
        params = trained(model)
        memory = torch.cat([p.detach().flatten() for p in params])
        for p, part in zip(params, memory.split([p.numel() for p in params]), strict=True):
            p.data = part.view(p.shape)
        optimizer = torch.optim.AdamW(params)
        optimizer.flat, optimizer.views = memory, [p.data for p in params]
        assert relora.restart_(model, optimizer).sites == 2

    def test_few_tensors_of_a_factor_s_shape_are_none(self):
        """As a batch that somebody's hook keeps."""
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        optimizer.batch, optimizer.codes = torch.zeros(2, 6), torch.zeros(256)
        assert relora.restart_(model, optimizer).sites == 2

    def test_a_wrapper_without_a_dict_is_looked_into(self):
        class Wrapper:
            __slots__ = ("__slow", "optimizer", "param_groups", "state")

            def __init__(self, optimizer):
                self.optimizer, self.param_groups = optimizer, optimizer.param_groups
                self.state = optimizer.state
                self.__slow = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

        model = low_rank()
        with pytest.raises(ValueError, match=r"Wrapper.*slow holds what looks like copies"):
            relora.restart_(model, Wrapper(torch.optim.AdamW(trained(model))))

    def test_copies_in_a_group_are_refused(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        optimizer.param_groups[0]["slow"] = [p.detach().clone() for p in trained(model)]
        with pytest.raises(ValueError, match=r"AdamW.param_groups\[...\]\['slow'\] holds"):
            relora.restart_(model, optimizer)

    def test_copies_that_the_inner_optimizer_steps_are_refused(self):
        """As fp32 masters under a wrapper that shows the model's own parameters."""

        class Masters(torch.optim.Optimizer):
            def __init__(self, params):
                super().__init__(params, {})
                masters = [nn.Parameter(p.detach().clone()) for p in self.param_groups[0]["params"]]
                self.optimizer = torch.optim.AdamW(masters)

        model = low_rank()
        with pytest.raises(ValueError, match=r"AdamW.param_groups\[...\]\['params'\] holds"):
            relora.restart_(model, Masters(trained(model)))

    def test_lists_of_the_parameters_themselves_are_none(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        optimizer.mine, optimizer.model = trained(model), model
        optimizer.every = SimpleNamespace(all=list(model.parameters()))
        optimizer.unused = lambda: empty  # noqa: F821 - a cell that is never filled
        backward(model)
        optimizer.step()
        optimizer.grads = [p.grad for p in trained(model)]
        assert relora.restart_(model, optimizer).sites == 2

    @pytest.mark.parametrize("kind", SCHEDULE_FREE)
    def test_schedule_free_s_follow_a_restart(self, kind):
        model = low_rank()
        optimizer, copies = schedule_free(kind, trained(model))
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        relora.restart_(model, optimizer)
        for p in factors(model):
            assert all(torch.equal(optimizer.state[p][key], p) for key in copies)

    @pytest.mark.parametrize("kind", SCHEDULE_FREE)
    def test_schedule_free_s_follow_adapters_that_are_loaded(self, kind, tmp_path):
        model = low_rank()
        optimizer, copies = schedule_free(kind, trained(model))
        relora.save_adapters(model, tmp_path)
        kept = [p.detach().clone() for p in factors(model)]
        for seed in range(5):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        relora.load_adapters(model, tmp_path)
        for p, before in zip(factors(model), kept, strict=True):
            assert torch.equal(p, before)
            assert all(torch.equal(optimizer.state[p][key], before) for key in copies)

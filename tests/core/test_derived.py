"""Nothing that was derived from old factors outlives a restart: it is renewed, or refused."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import relora_core as relora
from relora_core.averages import AveragedSites
from relora_core.stepped import was_stepped
from tests.kit.planted.layers import Fused
from tests.reference import randomize_


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def low_rank():
    torch.manual_seed(2)
    return relora.add_low_rank_(net(), "*", rank=2)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, seed=0):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def factors(model):
    return [p for _, site in relora.low_rank_sites(model) for p in (site.lora_A, site.lora_B)]


def assert_untouched(model, optimizer, call, error=ValueError, match=""):
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=match):
        call()
    after = model.state_dict(), optimizer.state_dict()
    for old, new in zip(
        torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True
    ):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


class TestGradients:
    def test_that_no_step_has_used_are_refused(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        backward(model)
        assert_untouched(
            model,
            optimizer,
            lambda: relora.restart_(model, optimizer),
            match="2 sites .first: 0. have gradients that no step has used",
        )

    @pytest.mark.parametrize("which", [0, 1, 2, 3])
    def test_of_one_factor_are_enough(self, which):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        p = factors(model)[which]
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=f"1 sites .first: {which // 2 * 2}"):
            relora.restart_(model, optimizer)

    def test_a_restart_in_every_micro_batch_of_a_step_is_one(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        relora.restart_(model, optimizer)
        backward(model)
        with pytest.raises(ValueError, match="once in an optimizer step"):
            relora.restart_(model, optimizer)
        assert {site.restart for _, site in relora.low_rank_sites(model)} == {1}

    @pytest.mark.parametrize("wrap", [lambda inner: inner, relora.ResettableOptimizer])
    def test_that_a_step_has_used_are_zeroed_in_place(self, wrap):
        """A loop may clear them before its next backward only."""
        model = low_rank()
        optimizer = wrap(torch.optim.AdamW(trained(model)))
        backward(model)
        optimizer.step()
        grads = [p.grad for p in factors(model)]
        bias = model[0].bias.grad.clone()
        relora.restart_(model, optimizer)
        for p, grad in zip(factors(model), grads, strict=True):
            assert p.grad is grad
            assert not grad.any()
        assert torch.equal(model[0].bias.grad, bias)

    def test_that_have_grown_since_the_step_are_refused(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        backward(model)
        optimizer.step()
        backward(model, seed=1)
        with pytest.raises(ValueError, match="no step has used"):
            relora.restart_(model, optimizer)

    def test_that_are_zero_are_none(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        backward(model)
        optimizer.zero_grad(set_to_none=False)
        assert relora.restart_(model, optimizer).sites == 2

    def test_are_known_by_themselves_and_not_by_their_address(self):
        p = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([p])
        for _ in range(50):
            p.grad = torch.ones(3)
            assert not was_stepped(p.grad)
            optimizer.step()
            assert was_stepped(p.grad)
            p.grad = None


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


class TestCopiesInOptimizers:
    def test_a_wrapper_s_own_state_is_refused_by_name(self):
        model = low_rank()
        optimizer = Lookahead(torch.optim.AdamW(trained(model)))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(ValueError, match=r"which of Lookahead's states \['slow'\]"):
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
        ],
    )
    def test_copies_in_an_attribute_are_refused_by_name(self, keep):
        model = low_rank()
        optimizer = Shadowing(trained(model), keep)
        assert_untouched(
            model,
            optimizer,
            lambda: relora.restart_(model, optimizer),
            match="Shadowing.slow_weights holds tensors of the parameters' shapes",
        )

    def test_lists_of_the_parameters_themselves_are_none(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        optimizer.mine = trained(model)
        backward(model)
        optimizer.step()
        optimizer.grads = [p.grad for p in trained(model)]
        assert relora.restart_(model, optimizer).sites == 2

    def test_schedule_free_s_follow_adapters_that_are_loaded(self, tmp_path):
        schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
        model = low_rank()
        optimizer = schedulefree.AdamWScheduleFree(trained(model), lr=1e-2)
        optimizer.train()
        relora.save_adapters(model, tmp_path)
        kept = [p.detach().clone() for p in factors(model)]
        for seed in range(5):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        relora.load_adapters(model, tmp_path)
        for p, before in zip(factors(model), kept, strict=True):
            assert torch.equal(p, before)
            assert torch.equal(optimizer.state[p]["z"], before)


class TestFrozenFactors:
    def test_have_their_moments_pruned_too(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        frozen = factors(model)[0].requires_grad_(False)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        relora.restart_(model, optimizer, prune_ratio=1.0)
        assert not optimizer.state[frozen]["exp_avg"].any()
        assert not optimizer.state[frozen]["exp_avg_sq"].any()

    def test_need_not_be_in_the_optimizer(self):
        model = low_rank()
        factors(model)[0].requires_grad_(False)
        assert relora.restart_(model, torch.optim.AdamW(trained(model))).sites == 2


class TestSeveralOptimizers:
    @pytest.mark.parametrize(
        "together", [list, tuple, lambda several: dict(enumerate(several)), iter]
    )
    def test_are_all_reset(self, together):
        model = low_rank()
        A = [p for n, p in model.named_parameters() if n.endswith("lora_A")]
        rest = [p for p in trained(model) if not any(p is one for one in A)]
        optimizers = [torch.optim.SGD(A, lr=0.1, momentum=0.9), torch.optim.AdamW(rest)]
        for seed in range(2):
            backward(model, seed)
            for one in optimizers:
                one.step()
                one.zero_grad()
        several = list(optimizers) if together is iter else together(optimizers)
        relora.restart_(model, several, prune_ratio=1.0)
        for p in A:
            assert not optimizers[0].state[p]["momentum_buffer"].any()
        for _, site in relora.low_rank_sites(model):
            assert not optimizers[1].state[site.lora_B]["exp_avg"].any()

    def test_one_of_them_alone_is_refused_with_the_way_out(self):
        model = low_rank()
        A = [p for n, p in model.named_parameters() if n.endswith("lora_A")]
        with pytest.raises(ValueError, match=r"2 of 4 parameters are not .* several as a list"):
            relora.restart_(model, torch.optim.SGD(A))

    @pytest.mark.parametrize("given", [None, 3, "adam", [None], {"a": 1}])
    def test_what_is_no_optimizer_is_refused(self, given):
        with pytest.raises(TypeError, match="optimizer must be a torch optimizer"):
            relora.restart_(low_rank(), given)

    def test_none_at_all_is_refused(self):
        with pytest.raises(ValueError, match="there is no optimizer"):
            relora.restart_(low_rank(), [])


class TestAverages:
    @pytest.mark.parametrize("use_buffers", [False, True])
    @pytest.mark.parametrize(
        "rule",
        [
            {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
            {"avg_fn": lambda averaged, now, n: 0.8 * averaged + 0.2 * now},
            {},
        ],
        ids=["ema", "own", "swa"],
    )
    def test_are_of_merged_weights(self, rule, use_buffers):
        """Over restarts, which an average of A and B apart does not survive."""
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model), lr=3e-2)
        averaged = AveragedModel(model, use_buffers=use_buffers, **rule)
        expected = None
        for step in range(12):
            if step and step % 5 == 0:
                relora.restart_(model, optimizer)
            backward(model, step)
            optimizer.step()
            averaged.update_parameters(model)
            now = {k: v.detach().clone() for k, v in relora.merged_state_dict(model).items()}
            keep = 0.8 if rule else step / (step + 1)
            if expected is None:
                expected = now
            else:
                expected = {k: keep * expected[k] + (1 - keep) * now[k] for k in now}
        found = relora.merged_state_dict(averaged.module)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)
        plain = net()
        plain.load_state_dict(expected)
        x = torch.randn(3, 6)
        torch.testing.assert_close(averaged(x), plain(x))

    def test_keep_their_class_s_name_in_copies_and_states(self):
        model = low_rank()
        averaged = AveragedModel(model)
        assert type(averaged) is AveragedSites
        assert isinstance(averaged, AveragedModel)
        randomize_(model)
        averaged.update_parameters(model)
        other = AveragedModel(low_rank())
        other.load_state_dict(averaged.state_dict())
        again = copy.deepcopy(averaged)
        x = torch.randn(3, 6)
        assert torch.equal(other(x), averaged(x))
        again.update_parameters(low_rank())
        assert not torch.equal(again(x), averaged(x))

    def test_of_a_subclass_too(self):
        class Mine(AveragedModel):
            def extra(self):
                return 3

        model = low_rank()
        averaged = Mine(model)
        assert averaged.extra() == 3
        randomize_(model)
        x = torch.randn(3, 6)
        averaged.update_parameters(model)
        torch.testing.assert_close(averaged(x), model(x))

    def test_of_a_plain_model_are_torch_s(self):
        assert type(AveragedModel(net())) is AveragedModel

    def test_over_split_bases_are_refused(self):
        model = low_rank()
        averaged = AveragedModel(model)
        relora.split_bases_(model)
        with pytest.raises(ValueError, match="would be rounded to 16 bits"):
            averaged.update_parameters(model)


class Detached(nn.Linear):
    def forward(self, x):
        return x @ self.weight.detach().t() + self.bias


class TestIdleSites:
    @pytest.mark.parametrize("layer", [Fused, Detached])
    def test_are_named_by_the_first_restart_and_by_the_summary(self, layer):
        model = nn.Sequential(layer(6, 8), nn.Tanh(), nn.Linear(8, 4))
        relora.add_low_rank_(model, "*", rank=2)
        optimizer = torch.optim.AdamW(trained(model))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        assert relora.summary(model).idle == ("0",)
        assert "0: B is zero" in str(relora.summary(model))
        with pytest.warns(UserWarning, match=r"B is still zero at 1 of 2 low-rank sites .0."):
            report = relora.restart_(model, optimizer)
        assert report.idle == ("0",)

    def test_are_none_where_all_or_none_are_trained(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        assert relora.restart_(model, optimizer).idle == ()
        backward(model)
        optimizer.step()
        assert relora.restart_(model, optimizer).idle == ()
        assert relora.summary(model).idle == ()


class TestWeightsWithoutMemory:
    @pytest.mark.parametrize("which", ["weight", "lora_A", "lora_B"])
    def test_are_refused_before_anything_changes(self, which):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        (_, site), *_ = relora.low_rank_sites(model)
        owner = site.low_rank if which != "weight" else site.owner[0]
        name = which if which != "weight" else "original"
        moved = nn.Parameter(getattr(owner, name).to("meta"), requires_grad=False)
        setattr(owner, name, moved)
        with pytest.raises(ValueError, match="0 has no memory"):
            relora.restart_(model, optimizer)
        assert {site.restart for _, site in relora.low_rank_sites(model)} == {0}

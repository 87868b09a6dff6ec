"""Nothing that was derived from old factors outlives a restart: it is renewed, or refused."""

import pytest
import torch
from torch import nn

import relora_core as relora
from relora_core.optim.stepped import was_stepped
from tests.core.models import assert_untouched, backward, factors, low_rank, net, trained
from tests.kit.planted.layers import Fused


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
        with pytest.raises(ValueError, match="once per optimizer step"):
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

    def test_that_are_sparse_are_refused_too(self):
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
        relora.add_low_rank_(model, "*", rank=2)
        optimizer = torch.optim.SGD(trained(model))
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ValueError, match="no step has used"):
            relora.restart_(model, optimizer)
        optimizer.step()
        assert relora.restart_(model, optimizer).sites == 1

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
        relora.restart_(model, together(optimizers), prune_ratio=1.0)
        for p in A:
            assert not optimizers[0].state[p]["momentum_buffer"].any()
        for _, site in relora.low_rank_sites(model):
            assert not optimizers[1].state[site.lora_B]["exp_avg"].any()

    def test_one_of_them_alone_is_refused_with_the_way_out(self):
        model = low_rank()
        A = [p for n, p in model.named_parameters() if n.endswith("lora_A")]
        with pytest.raises(ValueError, match=r"2 of 4 parameters are not .* as a list"):
            relora.restart_(model, torch.optim.SGD(A))

    @pytest.mark.parametrize("given", [None, 3, "adam", [None], {"a": 1}])
    def test_what_is_no_optimizer_is_refused(self, given):
        with pytest.raises(TypeError, match="optimizer must be a torch optimizer"):
            relora.restart_(low_rank(), given)

    def test_one_that_is_given_twice_counts_once(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        entries = 2 * sum(p.numel() for p in factors(model))
        assert relora.restart_(model, [optimizer, optimizer]).reset.entries == entries

    def test_none_at_all_is_refused(self):
        with pytest.raises(ValueError, match="there is no optimizer"):
            relora.restart_(low_rank(), [])


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

    @pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
    def test_are_all_of_them_where_only_the_rest_was_trained(self, make):
        model = nn.Sequential(Detached(6, 8), nn.Tanh(), Detached(8, 4))
        relora.add_low_rank_(model, "*", rank=2)
        optimizer = make(trained(model), lr=0.1)
        assert relora.summary(model).idle == ()
        for seed in range(2):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
            assert relora.summary(model).idle == ("0", "2")
            with pytest.warns(UserWarning, match="B is still zero at 2 of 2 low-rank sites"):
                assert relora.restart_(model, optimizer).idle == ("0", "2")

    def test_are_seen_where_the_factors_have_an_optimizer_of_their_own(self):
        model = nn.Sequential(Detached(6, 8), nn.Tanh(), Detached(8, 4))
        relora.add_low_rank_(model, "*", rank=2)
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        several = [torch.optim.SGD(factors(model)), torch.optim.AdamW(biases)]
        backward(model)
        for one in several:
            one.step()
            one.zero_grad()
        assert relora.summary(model).idle == ("0", "2")
        with pytest.warns(UserWarning, match="2 of 2"):
            relora.restart_(model, several)

    def test_are_none_before_the_optimizer_has_stepped_with_them(self):
        """The warm start's optimizer goes on, and a restart is tried before the first step."""
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        relora.add_low_rank_(model, "*", rank=2)
        optimizer.add_param_group({"params": factors(model)})
        assert relora.restart_(model, optimizer).idle == relora.summary(model).idle == ()

    def test_are_none_that_are_frozen_on_purpose(self):
        model = low_rank()
        for p in factors(model)[:2]:
            p.requires_grad_(False)
        optimizer = torch.optim.AdamW(trained(model))
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        assert relora.restart_(model, optimizer).idle == ()
        backward(model)
        optimizer.step()
        assert relora.summary(model).idle == ()

    def test_are_none_of_another_model_s_steps(self):
        other, model = low_rank(), low_rank()
        optimizer = torch.optim.AdamW(trained(other))
        backward(other)
        optimizer.step()
        assert relora.restart_(model, torch.optim.AdamW(trained(model))).idle == ()

    def test_are_none_where_all_or_none_are_trained(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        assert relora.restart_(model, optimizer).idle == ()
        backward(model)
        optimizer.step()
        assert relora.restart_(model, optimizer).idle == ()
        assert relora.summary(model).idle == ()


class TestBases:
    @pytest.mark.parametrize("make", [relora.add_low_rank_, None])
    def test_lose_their_gradient_with_the_site(self, make):
        """An optimizer that holds W still, with a zero gradient, would step it."""
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if make:
            make(model, "*", rank=2)
        else:
            relora.register_low_rank(model[0], rank=2)
        before = model[0].parametrizations.weight.original.clone()
        backward(model)
        optimizer.step()
        assert torch.equal(model[0].parametrizations.weight.original, before)

    def test_that_are_trained_are_refused_and_summed_up(self):
        model = low_rank()
        optimizer = torch.optim.AdamW(trained(model))
        model.requires_grad_(True)
        assert "0.weight" in relora.summary(model).whole
        assert_untouched(
            model,
            optimizer,
            lambda: relora.restart_(model, optimizer),
            match="W of 0 requires a gradient",
        )

    def test_a_model_comes_before_its_optimizer(self):
        model = low_rank()
        with pytest.raises(TypeError, match="model must be a Module; got AdamW"):
            relora.restart_(torch.optim.AdamW(trained(model)), model)


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

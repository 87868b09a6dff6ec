"""Rules in use elsewhere that are wrong: each in a few lines, and ours beside it.

Found in Guitaricet/relora, axolotl, relora-pico and Lightning-ReLoRA as they stood in 2026.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import relora_core as relora
from tests.reference import authors_cosine_restarts, dropped


class Adapter(nn.Module):
    """x (W + s B A)ᵀ, to be broken."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 5), requires_grad=False)
        self.A = nn.Parameter(torch.randn(3, 5))
        self.B = nn.Parameter(torch.zeros(6, 3))
        self.scale = scale

    def forward(self, x):
        return x @ (self.W + self.scale * self.B @ self.A).t()


def train(model, steps=20, optimizer=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    return optimizer


def low_rank(**options):
    return relora.add_low_rank_(nn.Sequential(nn.Linear(5, 6)), "0", rank=3, **options)


def site_of(model):
    return next(iter(relora.low_rank_sites(model)))[1]


class TestTheFirstCycle:
    def test_with_both_factors_zero_trains_nothing(self):
        theirs = Adapter()
        nn.init.zeros_(theirs.A)
        train(theirs)
        assert not theirs.A.any()
        assert not theirs.B.any()

    def test_of_ours_trains_both(self):
        model = low_rank()
        drawn = site_of(model).lora_A.detach().clone()
        train(model)
        assert site_of(model).lora_B.any()
        assert not torch.equal(site_of(model).lora_A, drawn)


class TanhScaled(Adapter):
    def __init__(self):
        super().__init__()
        self.scaling = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x @ (self.W + self.scaling.tanh() * self.B @ self.A).t()


class TestATrainedScale:
    def test_set_to_zero_at_a_merge_never_comes_back(self):
        theirs = TanhScaled()  # as a merge leaves it: B and the scale are zero
        train(theirs, 40)
        assert not theirs.B.any()
        assert not theirs.scaling.any()

    def test_of_ours_trains_on_after_one(self):
        model = low_rank(trainable_scale=True)
        optimizer = train(model)
        relora.restart_(model, optimizer)
        scale = site_of(model).low_rank.lora_scale.detach().clone()
        train(model, optimizer=optimizer)
        assert site_of(model).lora_B.any()
        assert not torch.equal(site_of(model).low_rank.lora_scale, scale)


class TestAMerge:
    def test_without_the_scale_moves_the_output(self):
        theirs = Adapter(scale=2.0)
        nn.init.normal_(theirs.B)
        x = torch.randn(4, 5)
        before, part = theirs(x), x @ (theirs.B @ theirs.A).t()
        with torch.no_grad():
            theirs.W += theirs.B @ theirs.A
            theirs.B.zero_()
        torch.testing.assert_close(theirs(x), before - part)

    def test_of_ours_keeps_it(self):
        model = low_rank(alpha=6.0)
        nn.init.normal_(site_of(model).lora_B)
        x = torch.randn(4, 5)
        before = model(x)
        relora.merge_(model)
        torch.testing.assert_close(model(x), before)


class TestAnEightBitReset:
    def made(self):
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        p = nn.Parameter(torch.randn(64, 80))
        optimizer = bnb.optim.AdamW8bit([p])
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
        return p, optimizer, optimizer.state[p]

    def momentum(self, state):
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(
            state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256
        )

    def test_of_the_codes_sets_entries_to_the_lowest_value_and_none_to_zero(self):
        _, _, state = self.made()
        codes = state["state1"]
        zeros_before = int((self.momentum(state) == 0).sum())
        threshold = torch.quantile(codes.float(), 0.9)
        codes[codes <= threshold] = 0
        assert (codes == 0).float().mean() > 0.89  # what such a reset reports as zeroed
        momentum = self.momentum(state).view(-1, 256)
        scaled = momentum / state["absmax1"].unsqueeze(1)
        assert (scaled < -0.99).float().mean() > 0.89  # what they are
        assert int((momentum == 0).sum()) <= zeros_before

    def test_of_ours_zeroes_what_they_stand_for(self):
        p, optimizer, state = self.made()
        before = self.momentum(state)
        relora.reset_optimizer_(optimizer, [p], prune_ratio=0.9)
        after = self.momentum(state)
        kept = after != 0
        assert int(kept.sum()) == 5120 - dropped(5120, 0.9)
        assert torch.equal(after[kept], before[kept])


class Masters(torch.optim.SGD):
    """Steps fp32 copies of the parameters, and then copies those back, as engines do."""

    def __init__(self, params, lr):
        self.model_params = list(params)
        super().__init__([p.detach().clone() for p in self.model_params], lr=lr)

    def step(self, closure=None):
        masters = self.param_groups[0]["params"]
        for p, master in zip(self.model_params, masters, strict=True):
            master.grad = p.grad
        super().step()
        with torch.no_grad():
            for p, master in zip(self.model_params, masters, strict=True):
                p.copy_(master)


class TestAnOptimizerOverCopies:
    def test_undoes_a_redraw(self):
        theirs = Adapter()
        optimizer = Masters([theirs.A, theirs.B], lr=0.0)
        old = theirs.A.detach().clone()
        train(theirs, 1, optimizer)
        nn.init.normal_(theirs.A)
        train(theirs, 1, optimizer)
        assert torch.equal(theirs.A, old)

    def test_is_refused_by_ours_before_anything_changes(self):
        model = low_rank()
        optimizer = Masters([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        train(model, 2, optimizer)
        before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
        with pytest.raises(ValueError, match="steps its own copies"):
            relora.restart_(model, optimizer)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


class Jagged(lr_scheduler.LRScheduler):
    """Multiplies what the inner one computes from a rate that has the ramp in it already."""

    def __init__(self, inner, restarts):
        self.inner, self.restarts = inner, restarts
        super().__init__(inner.optimizer)

    def get_lr(self):
        self.inner.last_epoch = self.last_epoch
        ramp = max(self.restarts.factor(self.last_epoch), 1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises against what goes wrong here
            return [lr * ramp for lr in self.inner.get_lr()]


class TestARampOverARecursiveSchedule:
    restarts = relora.Restarts(every=10, warmup=4)
    inner = pytest.mark.parametrize(
        "inner",
        [
            lambda o: lr_scheduler.ExponentialLR(o, 0.99),
            lambda o: lr_scheduler.StepLR(o, 1000),
            lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 100),
        ],
        ids=["ExponentialLR", "StepLR", "LinearLR"],
    )

    def rate_after(self, make, steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make(optimizer)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return optimizer.param_groups[0]["lr"]

    @inner
    def test_feeds_on_itself_and_never_recovers(self, inner):
        assert self.rate_after(lambda o: Jagged(inner(o), self.restarts), 15) < 1e-3

    @inner
    def test_of_ours_is_back_after_the_warm_up(self, inner):
        made = self.rate_after(lambda o: relora.JaggedLR(inner(o), self.restarts), 15)
        assert made == pytest.approx(self.rate_after(inner, 15))

    def test_over_a_sequence_fails_and_ours_does_not(self):
        def sequence(o):
            parts = [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 30)]
            return lr_scheduler.SequentialLR(o, parts, milestones=[6])

        with pytest.raises(NotImplementedError):  # torch's own, without a message
            self.rate_after(lambda o: Jagged(sequence(o), self.restarts), 1)
        made = self.rate_after(lambda o: relora.JaggedLR(sequence(o), self.restarts), 15)
        assert made == pytest.approx(self.rate_after(sequence, 15))


class TestAMovedFirstRestart:
    def test_has_no_dip_by_the_authors_schedule(self):
        options = {"total": 100, "first_warmup": 2, "every": 20, "warmup": 4, "low": 0.1}
        assert (
            authors_cosine_restarts(20 - 5, adjust=5, **options) > 0.8
        )  # merged here, at full rate
        assert authors_cosine_restarts(40 - 5, adjust=5, **options) == 0.0

    def test_of_ours_dips_as_every_other(self):
        restarts = relora.Restarts(every=20, warmup=4, first=15)
        schedule = relora.JaggedCosine(100, restarts, warmup=2)
        assert restarts.at(15)
        assert schedule(15) == schedule(35) == 0.0


class TestThePruningThreshold:
    @staticmethod
    def by_quantile(tensor, ratio):
        return tensor.abs() > torch.quantile(tensor.abs().float(), ratio)

    def test_as_a_quantile_fails_above_two_to_the_24_and_ours_does_not(self):
        tensor = torch.ones(2**24 + 1, dtype=torch.float16)
        with pytest.raises(RuntimeError, match="too large"):
            self.by_quantile(tensor, 0.5)
        assert int((relora.magnitude_prune_(tensor, ratio=0.5) == 0).sum()) == 2**23 + 1

    def test_as_a_quantile_wipes_a_tensor_of_equals_and_ours_keeps_its_share(self):
        assert not self.by_quantile(torch.ones(10), 0.5).any()
        assert int((relora.magnitude_prune_(torch.ones(10), ratio=0.5) == 0).sum()) == 5

    def test_skipping_what_is_too_large_leaves_it_all_and_ours_reports_the_truth(self):
        p = nn.Parameter(torch.zeros(2**24 + 1, dtype=torch.float16))
        optimizer = torch.optim.SGD([p], momentum=0.9)
        p.grad = torch.ones_like(p)
        optimizer.step()
        momentum = optimizer.state[p]["momentum_buffer"]
        if momentum.numel() <= 2**24:  # the rule that skips
            momentum.mul_(self.by_quantile(momentum, 0.9))
        assert momentum.all()
        report = relora.reset_optimizer_(optimizer, [p], prune_ratio=0.9)
        assert report.zeroed == int((momentum == 0).sum()) == dropped(2**24 + 1, 0.9)

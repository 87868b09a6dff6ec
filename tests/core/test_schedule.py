"""One clock; a ramp that touches nothing outside itself, over every scheduler torch ships."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import relora_core as relora
from tests.reference import authors_cosine_restarts

STEPS = 40


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer):
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.CosineAnnealingLR(optimizer, 30)],
        milestones=[6],
    )


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 0.5, STEPS + 1)


def cyclic(optimizer):
    return lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, step_size_up=7)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 17], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 12),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 30, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 9),
    "CyclicLR": cyclic,
    "OneCycleLR": one_cycle,
    "ReduceLROnPlateau": plateau,
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
}


def sgd(tensor_lr=False):
    params = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": lr * 2}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(optimizer, schedule, kind, steps, first=0):
    """Return the rates at each step from `first` on."""
    seen = []
    for step in range(first, steps):
        seen.append(rates(optimizer))
        optimizer.step()
        schedule.step(*([1.0 + step % 5] if kind == "ReduceLROnPlateau" else []))
    return seen


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
class TestJaggedLR:
    def made(self, kind, tensor_lr, restarts=None):
        optimizer = sgd(tensor_lr)
        schedule = SCHEDULERS[kind](optimizer)
        return optimizer, relora.JaggedLR(schedule, restarts) if restarts else schedule

    @pytest.mark.parametrize("more", [{}, {"first": 13, "anneal": 3}])
    def test_is_the_inner_one_times_the_ramp(self, kind, tensor_lr, more):
        restarts = relora.Restarts(every=10, warmup=4, **more)
        smooth = advance(*self.made(kind, tensor_lr), kind, STEPS)
        jagged = advance(*self.made(kind, tensor_lr, restarts), kind, STEPS)
        for step in range(STEPS):
            expected = [restarts.factor(step) * lr for lr in smooth[step]]
            assert jagged[step] == pytest.approx(expected, rel=1e-6, abs=0)
            if restarts.at(step):
                assert jagged[step] == [0.0, 0.0]
            if restarts.factor(step) == 1:
                assert jagged[step] == smooth[step]

    def test_without_a_restart_is_the_inner_one_bit_for_bit(self, kind, tensor_lr):
        never = relora.Restarts(every=STEPS + 1, warmup=1)
        smooth = advance(*self.made(kind, tensor_lr), kind, STEPS)
        assert advance(*self.made(kind, tensor_lr, never), kind, STEPS) == smooth

    def test_resumed_at_any_step_walks_on_as_if_never_stopped(self, kind, tensor_lr):
        restarts = relora.Restarts(every=10, warmup=4, anneal=2)
        smooth = advance(*self.made(kind, tensor_lr), kind, STEPS)
        jagged = advance(*self.made(kind, tensor_lr, restarts), kind, STEPS)
        torn = []
        for at in range(STEPS):
            ours = self.resumed(kind, tensor_lr, restarts, at) == jagged[at:]
            # torch 2.8's own SequentialLR does not resume exactly with a tensor rate.
            torn += (
                [at] if not ours and self.resumed(kind, tensor_lr, None, at) == smooth[at:] else []
            )
        assert not torn

    def resumed(self, kind, tensor_lr, restarts, at):
        """Return the rates from `at` on of a run that was saved and loaded there."""
        optimizer, schedule = self.made(kind, tensor_lr, restarts)
        advance(optimizer, schedule, kind, at)
        state = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
        optimizer, schedule = self.made(kind, tensor_lr, restarts)
        optimizer.load_state_dict(state[0])
        schedule.load_state_dict(state[1])
        return advance(optimizer, schedule, kind, STEPS, first=at)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("at", [3, 9, 11, 14, 27])  # before, in a ramp, and after one
def test_a_rate_that_is_changed_by_hand_is_kept_as_the_inner_one_keeps_it(kind, tensor_lr, at):
    """By others than schedulers: a callback, a user at a prompt."""
    restarts = relora.Restarts(every=8, warmup=4)

    def rates(jagged):
        lr = torch.tensor(0.8) if tensor_lr else 0.8
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        schedule = SCHEDULERS[kind](optimizer)
        if jagged:
            schedule = relora.JaggedLR(schedule, restarts)
        found = []
        for step in range(STEPS):
            if step == at:
                group = optimizer.param_groups[0]
                group["lr"] = group["lr"] * 0.3
            found.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
        return found

    smooth = rates(jagged=False)
    expected = [rate * restarts.factor(step) for step, rate in enumerate(smooth)]
    assert rates(jagged=True) == pytest.approx(expected, rel=1e-5)


def test_a_rate_that_is_set_in_the_dip_is_the_one_to_rise_to():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    inner = lr_scheduler.MultiplicativeLR(optimizer, lambda t: 1.0)
    schedule = relora.JaggedLR(inner, relora.Restarts(every=4, warmup=2))
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.0]
    optimizer.param_groups[0]["lr"] = 0.5
    found = []
    for _ in range(3):
        optimizer.step()
        schedule.step()
        found += schedule.get_last_lr()
    assert found == [0.25, 0.5, 0.5]


def test_the_state_survives_json():
    optimizer = sgd()
    schedule = relora.JaggedLR(
        lr_scheduler.LambdaLR(optimizer, relora.JaggedCosine(total=40)),
        relora.Restarts(every=10, warmup=4),
    )
    state = schedule.state_dict()
    schedule.load_state_dict(json.loads(json.dumps(state, default=vars)))
    assert schedule.get_last_lr() == state["last_lr"]


def test_another_clock_s_state_is_refused():
    made = [
        relora.JaggedLR(
            lr_scheduler.ExponentialLR(sgd(), 0.9), relora.Restarts(every=every, warmup=4)
        )
        for every in (10, 20)
    ]
    before = copy.deepcopy(made[1].state_dict())
    with pytest.raises(ValueError, match="a run keeps one clock"):
        made[1].load_state_dict(made[0].state_dict())
    assert made[1].state_dict() == before


def test_the_same_clock_given_otherwise_is_no_other():
    one, same = (
        relora.JaggedLR(lr_scheduler.ExponentialLR(sgd(), 0.9), restarts)
        for restarts in (
            relora.Restarts(every=10, warmup=4),
            relora.Restarts(every=10, warmup=4, first=10),
        )
    )
    same.optimizer.step()
    same.step()
    one.load_state_dict(same.state_dict())
    assert one.last_epoch == 1


def test_a_group_added_later_takes_part():
    optimizer = sgd()
    schedule = relora.JaggedLR(plateau(optimizer), relora.Restarts(every=4, warmup=2))
    advance(optimizer, schedule, "ReduceLROnPlateau", 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4})
    seen = []
    for _ in range(5):
        optimizer.step()
        schedule.step(0.5 / (len(seen) + 1))
        seen.append(rates(optimizer)[2])
    assert seen == [0.4, 0.0, 0.2, 0.4, 0.4]


def test_goes_on_from_where_the_inner_one_stands():
    restarts = relora.Restarts(every=10, warmup=4)
    optimizer = sgd()
    inner = lr_scheduler.ExponentialLR(optimizer, 0.9)
    advance(optimizer, inner, "ExponentialLR", 9)
    schedule = relora.JaggedLR(inner, restarts)
    smooth = 0.1 * 0.9**9
    seen = [lr for lr, _ in advance(optimizer, schedule, "ExponentialLR", 3)]
    assert seen == pytest.approx([smooth, 0.0, smooth * 0.9**2 / 4])


def test_goes_on_from_where_chained_ones_stand():
    optimizer = sgd()
    inner = lr_scheduler.ExponentialLR(optimizer, 0.9)
    chained = lr_scheduler.ChainedScheduler([inner], optimizer)
    for _ in range(3):
        optimizer.step()
        chained.step()
    assert relora.JaggedLR(chained, relora.Restarts(every=10, warmup=4)).last_epoch == 3


def test_what_is_no_scheduler_or_clock_is_refused():
    optimizer = sgd()
    with pytest.raises(TypeError, match="inner must be a torch LRScheduler"):
        relora.JaggedLR(optimizer, relora.Restarts(every=4, warmup=2))
    with pytest.raises(TypeError, match="restarts must be a Restarts"):
        relora.JaggedLR(plateau(optimizer), 4)


class TestRestarts:
    @given(st.integers(2, 50), st.data())
    def test_the_ramp_is_zero_at_each_restart_and_one_after_its_warm_up(self, every, data):
        warmup = data.draw(st.integers(1, every - 1))
        restarts = relora.Restarts(every=every, warmup=warmup)
        done = 0
        for step in range(4 * every):
            done += restarts.at(step)
            assert restarts.count(step) == done
            since = step % every
            expected = 1.0 if step < every else min(1.0, since / warmup)
            assert restarts.factor(step) == expected
            assert restarts.at(step) == (step > 0 and restarts.factor(step) == 0.0)

    @given(st.data())
    def test_an_offset_clock_is_the_plain_one_moved(self, data):
        every = data.draw(st.integers(2, 30))
        warmup = data.draw(st.integers(1, every - 1))
        first = data.draw(st.integers(1, 60))
        plain = relora.Restarts(every=every, warmup=warmup)
        moved = relora.Restarts(every=every, warmup=warmup, first=first)
        for step in range(first + 3 * every):
            along = max(step - first + every, 0)
            assert moved.at(step) == (step >= first and plain.at(along))
            assert moved.count(step) == plain.count(along)
            assert moved.factor(step) == plain.factor(along)

    @given(st.data())
    def test_an_anneal_mirrors_the_warm_up(self, data):
        every = data.draw(st.integers(3, 30))
        warmup = data.draw(st.integers(1, every - 2))
        anneal = data.draw(st.integers(1, every - 1 - warmup))
        restarts = relora.Restarts(every=every, warmup=warmup, anneal=anneal)
        for before in range(every - warmup):
            expected = 0.0 if before == 0 else min(1.0, before / anneal)
            assert restarts.factor(2 * every - before) == expected
            assert restarts.factor(every - before) == expected

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"every": 10, "warmup": 6, "anneal": 4}, ValueError, "and anneal together.*anneal=4"),
            ({"every": 10, "warmup": 6, "anneal": -1}, ValueError, "anneal=-1"),
            ({"every": 10, "warmup": 6, "first": 0}, ValueError, "at step 1 or later; got first=0"),
            ({"every": 10, "warmup": 6, "first": 3, "anneal": 3}, ValueError, "after its anneal"),
            ({"every": 10, "warmup": 6, "first": 3.0}, TypeError, "first must be an int"),
            ({"every": 10, "warmup": 10}, ValueError, "longer than its warm-up.*every=10"),
            ({"every": 10, "warmup": 0}, ValueError, "at least one step"),
            ({"every": 10, "warmup": 2.5}, TypeError, "warmup must be an int"),
            ({"every": True, "warmup": 1}, TypeError, "every must be an int"),
        ],
    )
    def test_an_impossible_clock_is_refused(self, arguments, error, message):
        with pytest.raises(error, match=message):
            relora.Restarts(**arguments)


@st.composite
def clocks(draw):
    """A clock with every kind of offset and anneal."""
    every = draw(st.integers(3, 30))
    warmup = draw(st.integers(1, every - 2))
    anneal = draw(st.integers(0, every - 1 - warmup))
    first = draw(st.none() | st.integers(anneal + 1, 40))
    return relora.Restarts(every=every, warmup=warmup, anneal=anneal, first=first)


class TestJaggedCosine:
    @given(st.data())
    def test_is_the_authors_schedule_where_that_is_defined(self, data):
        every = data.draw(st.integers(2, 40))
        total = every * data.draw(st.integers(1, 6))
        warmup = data.draw(st.integers(1, every - 1))
        first_warmup = data.draw(st.integers(0, min(every, total - 1)))
        low = data.draw(st.floats(0.001, 1))
        clock = relora.Restarts(every=every, warmup=warmup)
        ours = relora.JaggedCosine(total, clock, warmup=first_warmup, min_ratio=low)
        options = {"total": total, "every": every, "warmup": warmup, "low": low}
        for step in range(total):
            theirs = authors_cosine_restarts(step, first_warmup=first_warmup, **options)
            assert ours(step) == pytest.approx(theirs, abs=1e-12)

    @given(st.integers(1, 60), st.data(), st.floats(0, 1), st.integers(0, 80))
    def test_without_restarts_is_a_cosine_after_a_warm_up(self, total, data, low, step):
        warmup = data.draw(st.integers(0, total - 1))
        progress = min(1, (step - warmup) / (total - warmup))
        expected = low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
        if step < warmup:
            expected = step / warmup
        value = relora.JaggedCosine(total, warmup=warmup, min_ratio=low)(step)
        assert value == pytest.approx(expected, abs=1e-12)

    @given(clocks(), st.integers(50, 200), st.floats(0, 1))
    def test_is_the_smooth_one_outside_ramps_and_straight_inside(self, clock, total, low):
        smooth = relora.JaggedCosine(total, min_ratio=low)
        jagged = relora.JaggedCosine(total, clock, min_ratio=low)
        for step in range(total):
            factor = clock.factor(step)
            end = clock.ramp_end(step)
            assert clock.factor(end) == 1
            if factor == 1:
                assert end == step
                assert jagged(step) == smooth(step)
            assert jagged(step) == pytest.approx(factor * smooth(end), abs=1e-12)
            if clock.at(step):
                assert jagged(step) == 0
            if step + 2 < total and end == clock.ramp_end(step + 1) == clock.ramp_end(step + 2):
                first, second, third = (jagged(step + k) for k in range(3))
                assert third - second == pytest.approx(second - first, abs=1e-12)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"total": 0},
            {"total": 1, "warmup": -1},
            {"total": 5, "warmup": 5},
            {"total": 1, "min_ratio": 1.1},
            {"total": 50, "warmup": 11, "restarts": relora.Restarts(every=10, warmup=2)},
            {"total": 50, "warmup": 8, "restarts": relora.Restarts(every=10, warmup=2, anneal=3)},
        ],
    )
    def test_an_impossible_schedule_is_refused(self, arguments):
        with pytest.raises(ValueError, match="got"):
            relora.JaggedCosine(**arguments)

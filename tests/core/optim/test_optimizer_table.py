"""Every property of a reset and of the wrapper, for every optimizer of the table."""

import math
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CosineAnnealingLR

import relora_core as relora
from tests.core.optim.optimizers import (
    OPTIMIZERS,
    made,
    quiet_and_eager,
    raw,
    set_gradients,
    stepped,
    take_step,
    value_of,
)
from tests.reference import dropped, mask_by_sorting

ON_CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # What torch says of itself, of the first backward of a process and of compiled fp32 products.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix"),
)
MARKS = {"cpu": (), "cuda": ON_CUDA}


def rows(promise, **where):
    """Return the rows of a promise: those that cannot keep it must be seen to fail."""
    found = []
    for name, row in OPTIMIZERS.items():
        if any(bool(getattr(row, key)) is not value for key, value in where.items()):
            continue
        for device in row.devices:
            marks = [*MARKS[device]]
            if promise in row.cannot:
                marks.append(pytest.mark.xfail(reason=row.cannot[promise], strict=True))
            found.append(pytest.param(row, device, id=f"{name}-{device}", marks=marks))
    return pytest.mark.parametrize(("row", "device"), found)


@pytest.fixture(autouse=True)
def _quiet_and_eager():
    with quiet_and_eager():
        yield


def everything(optimizer, model):
    return raw([optimizer.state_dict(), list(model.parameters())])


def expect_refusal(row, kind, optimizer, model, **options):
    """Return whether the row refuses this kind of reset, which must then change nothing."""
    reason = row.refused.get("reset") or row.refused.get(kind)
    if reason is None:
        return False
    before = everything(optimizer, model)
    with pytest.raises(ValueError, match=reason):
        relora.reset_optimizer_(optimizer, model.parameters(), **options)
    assert everything(optimizer, model) == before
    return True


class TestReset:
    @rows("prune")
    def test_prunes_what_it_says_and_nothing_else(self, row, device):
        optimizer, model = stepped(row, device)
        if expect_refusal(row, "prune", optimizer, model, prune_ratio=0.9):
            return
        first, *rest = model.parameters()
        states = [optimizer.state.get(p, {}) for p in (first, *rest)]
        before = {key: value_of(states[0], key).clone() for key in row.moments}
        others = raw([states[0].get(k) for k in states[0] if k not in {*row.moments, *row.copies}])
        rest_before = raw([states[1:], rest, optimizer.state_dict()["param_groups"], first])

        report = relora.reset_optimizer_(optimizer, [first], prune_ratio=0.9)

        gone = dropped(first.numel(), 0.9)
        for key, value in before.items():
            mask = mask_by_sorting(before[row.moments[0]], 0.9)
            assert torch.equal(value_of(states[0], key), value.masked_fill(mask, 0))
        for key in row.copies:
            assert torch.equal(states[0][key], first)
        shared = sum(states[0][key].numel() for key in row.shared)
        assert report.zeroed == gone * len(row.moments)
        assert report.entries == first.numel() * len(row.moments) + shared
        kept = [states[0].get(k) for k in states[0] if k not in {*row.moments, *row.copies}]
        assert raw(kept) == others
        after = raw([states[1:], rest, optimizer.state_dict()["param_groups"], first])
        assert after == rest_before

    @rows("full")
    def test_in_full_zeroes_all(self, row, device):
        optimizer, model = stepped(row, device)
        if expect_refusal(row, "full", optimizer, model, prune_ratio=1.0):
            return
        report = relora.reset_optimizer_(optimizer, model.parameters(), prune_ratio=1.0)
        assert report.zeroed == report.entries
        for p in model.parameters():
            state = optimizer.state.get(p, {})
            assert not any(value_of(state, key).any() for key in row.moments if key in state)
            assert not any(state[key].any() for key in row.shared if key in state)

    @rows("reset_step")
    def test_of_the_step_begins_the_count_anew_or_is_refused(self, row, device):
        optimizer, model = stepped(row, device)
        options = {"prune_ratio": 1.0, "reset_step": True}
        if expect_refusal(row, "reset_step", optimizer, model, **options):
            return
        first, *rest = model.parameters()
        counts = [optimizer.state.get(p, {}).get("step") for p in rest]
        before = raw(counts)
        relora.reset_optimizer_(optimizer, [first], **options)
        assert all(optimizer.state[first][key] == begin for key, begin in row.clock.items())
        assert raw(counts) == before
        set_gradients(model, 9)
        take_step(optimizer)
        assert all(p.isfinite().all() for p in model.parameters())

    @rows("without state")
    def test_without_state_reports_and_makes_none(self, row, device):
        optimizer, model = made(row, device)
        if expect_refusal(row, "without state", optimizer, model):
            return
        before = set(optimizer.state)
        report = relora.reset_optimizer_(optimizer, model.parameters())
        assert set(optimizer.state) == before
        if "Adagrad" not in row.path:  # it makes its state at construction
            assert (report.entries, report.zeroed) == (0, 0)

    @rows("bounded", moments=True)
    def test_leaves_the_next_updates_bounded(self, row, device):
        """Also where the gradient is zero, as A's is while B is."""
        optimizer, model = made(row, device)
        first = next(model.parameters())

        def largest(steps, zero):
            moved = 0.0
            for step in steps:
                before = first.detach().clone()
                set_gradients(model, step, zero=zero)
                take_step(optimizer)
                moved = max(moved, float((first.detach() - before).abs().max()))
            return moved

        usual = largest(range(30), 0)
        ratio = 1.0 if "prune" in row.refused else 0.9
        relora.reset_optimizer_(optimizer, model.parameters(), prune_ratio=ratio)
        assert largest([30], 1) <= 4 * usual
        assert largest(range(31, 36), 0) <= 4 * usual


class TestWrapper:
    @rows("steps as bare")
    def test_steps_as_the_bare_one_bit_for_bit(self, row, device):
        bare, model = stepped(row, device)
        inner, twin = made(row, device)
        optimizer = relora.ResettableOptimizer(inner)
        for step in range(3):
            set_gradients(twin, step)
            take_step(optimizer)
        assert everything(optimizer, twin) == everything(bare, model)

    @rows("schedule")
    def test_a_schedule_on_it_drives_the_inner_one(self, row, device):
        inner, model = made(row, device)
        optimizer = relora.ResettableOptimizer(inner)
        restarts = relora.Restarts(every=4, warmup=2)
        schedule = relora.JaggedLR(CosineAnnealingLR(optimizer, 20), restarts)
        rates = []
        for step in range(8):
            rates.append(float(inner.param_groups[0]["lr"]))
            set_gradients(model, step)
            take_step(optimizer)
            schedule.step()
        expected = [
            1e-2 * (1 + math.cos(math.pi * step / 20)) / 2 * restarts.factor(step)
            for step in range(8)
        ]
        assert rates == pytest.approx(expected, rel=1e-5, abs=1e-9)
        bare, twin = made(row, device)
        for step, rate in enumerate(rates):
            for group in bare.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            set_gradients(twin, step)
            take_step(bare)
        assert raw(list(model.parameters())) == raw(list(twin.parameters()))

    @rows("grad scaler")
    def test_a_grad_scaler_skips_an_infinite_step_as_for_the_bare_one(self, row, device):
        if row.path == "torch.optim.LBFGS":
            pytest.skip("GradScaler takes no closure")
        ends = []
        for wrap in (lambda o: o, relora.ResettableOptimizer):
            inner, model = made(row, device)
            optimizer = wrap(inner)
            scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=100)
            scaler.scale(torch.ones((), device=device))  # makes the scale
            for step, factor in enumerate((1.0, math.inf, 1.0)):
                before = raw(list(model.parameters()))
                set_gradients(model, step)
                for p in model.parameters():
                    p.grad *= scaler.get_scale() * factor
                scaler.step(optimizer)
                scaler.update()
                if math.isinf(factor):
                    assert raw(list(model.parameters())) == before
            ends.append(everything(optimizer, model))
            assert not hasattr(inner, "found_inf")
        assert ends[0] == ends[1]

    @rows("dcp")
    def test_goes_on_exactly_from_a_distributed_checkpoint(self, row, device, tmp_path):
        self.save_and_go_on(row, device, tmp_path, flat=False)

    @rows("dcp flat")
    def test_goes_on_exactly_from_a_flat_one(self, row, device, tmp_path):
        self.save_and_go_on(row, device, tmp_path, flat=True)

    def save_and_go_on(self, row, device, tmp_path, *, flat):
        """Save in the middle of a cycle, one step after a reset."""
        if row.path == "torch.optim.LBFGS":
            pytest.skip("DCP takes no closure")
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        inner, model = stepped(row, device)
        optimizer = relora.ResettableOptimizer(inner)
        if "reset" not in row.refused:
            optimizer.reset_(model.parameters(), prune_ratio=1.0)
        set_gradients(model, 3)
        take_step(optimizer)
        weights = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own: no process group, shapes of the step
            saved = get_optimizer_state_dict(model, optimizer, options=options)
            dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "checkpoint")

            fresh, twin = made(row, device, seed=2)
            other = relora.ResettableOptimizer(fresh)
            state = {"optimizer": get_optimizer_state_dict(twin, other, options=options)}
            dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
            set_optimizer_state_dict(twin, other, state["optimizer"], options=options)
        with torch.no_grad():
            for p, weight in zip(twin.parameters(), weights, strict=True):
                p.copy_(weight)
        for step in range(4, 6):
            for one, its in ((optimizer, model), (other, twin)):
                set_gradients(its, step)
                take_step(one)
        assert raw(list(model.parameters())) == raw(list(twin.parameters()))
        assert raw([inner.state.get(p) or {} for p in model.parameters()]) == raw(
            [fresh.state.get(p) or {} for p in twin.parameters()]
        )

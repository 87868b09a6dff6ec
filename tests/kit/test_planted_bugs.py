"""The kit finds every planted bug and no other, with the smallest case as code that runs."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from relora_core import testing
from relora_core.testing.checks.restarts import _ALGORITHM, _LEFTOVERS
from relora_core.testing.properties import roundtrips as lifetimes
from tests.kit.findings import adamw, assert_code_repeats_it, found
from tests.kit.planted import layers, resets, restarts, schedules

SIZES = {
    "inner": st.integers(1, 7),
    "out": st.integers(1, 7),
    "alpha": st.sampled_from([1.0, 2.0, 0.5]),
}


def drawn(planted_layer):
    return testing.strategies.calls(planted_layer, **SIZES)


LAYERS = {
    layers.ZeroFactors: "every factor learns in every cycle",
    layers.MergeWithoutScale: "a merge keeps the function",
    layers.MergeKeepsB: "a merge keeps the function",
    layers.MergeThroughHalf: "a merge keeps the function",
    layers.MergeInGraph: "its gradients are those",
    layers.MergeIsNotCalled: "a merge adds s B A to W, rounds once, and zeroes B",
    layers.MergeRaises: "it computes with W + s B A",
    layers.SixteenBits: ("a merge adds s B A to W, rounds once", "small merges are not lost"),
    layers.SixteenBitsRoundedOnce: "small merges are not lost",
    layers.DeadScale: "a merge adds s B A to W, rounds once",
    layers.GlobalDraw: "a redraw depends on its key alone",
    layers.SameDraw: "a redraw depends on its key alone",
    layers.SpectralDraw: "a redraw depends on its key alone",
    # Loaded, it draws again what it had: which property sees it first depends on what is drawn.
    layers.CountIsNotSaved: (
        "a redraw depends on its key alone",
        "the rank grows with each restart",
        "saving and loading commute with restarts",
    ),
    layers.TrainedBase: "its gradients are those",
}


def test_a_sound_layer_of_the_user_s_keeps_every_promise():
    held = testing.check_low_rank(drawn(layers.Layer))
    assert len(held) == 11  # not that ours can be removed


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_a_bug_of_a_layer_is_found(layer):
    report = found(testing.check_low_rank, drawn(layer))
    properties = LAYERS[layer]
    assert report.removeprefix("broken: ").startswith(properties)
    assert f"from tests.kit.planted.layers import {layer.__name__}" in report
    assert_code_repeats_it(report)


def test_the_case_is_the_smallest_one():
    report = found(testing.check_low_rank, drawn(layers.MergeWithoutScale))
    assert "MergeWithoutScale(inner=1, out=1, alpha=2.0)" in report
    assert "testing.lived(factory, ['fill'], seed=0)" in report


def test_a_tied_weight_is_found():
    report = found(testing.check_low_rank, layers.TiedPair)
    assert report.startswith("broken: it computes with W + s B A")
    assert_code_repeats_it(report)


def test_a_layer_that_caches_its_weight_is_found():
    """The factory makes a plain module: the kit gives it sites."""
    report = found(testing.check_low_rank, layers.Unused)
    assert "relora.register_low_rank(Unused(), rank=1)" in report
    assert_code_repeats_it(report)


RESETS = {
    resets.by_quantile: "a ratio zeroes its share, and keeps the bits of the rest",
    resets.apart: "the step after a reset is bounded",
    resets.passing_over_the_large: "a ratio zeroes its share of more than 2**24 entries",
    resets.nearly_all: "a full reset leaves nothing",
    resets.nothing: "a full reset leaves nothing",
    resets.deleting: "a ratio zeroes its share",
    resets.of_everything: "a reset leaves all else",
    resets.looking: "a reset before the first step does nothing",
    resets.blind_to_nan: "moments that hold NaN are refused",
}


@pytest.mark.parametrize("reset", RESETS, ids=lambda reset: reset.__name__)
def test_a_bug_of_a_reset_is_found(reset):
    report = found(testing.check_resettable, adamw, reset=reset)
    assert report.startswith(f"broken: {RESETS[reset]}")
    assert_code_repeats_it(report)


def test_a_reset_of_8_bit_codes_is_found():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make = testing.strategies.calls(bnb.optim.AdamW8bit, lr=st.just(0.01))
    sizes = st.just(((64, 80), (9,)))
    report = found(testing.check_resettable, make, reset=resets.of_codes, sizes=sizes)
    assert report.startswith("broken: a full reset leaves nothing")
    assert_code_repeats_it(report)


def test_a_reset_of_all_that_has_the_parameter_s_shape_is_found():
    free = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    make = testing.strategies.calls(free.AdamWScheduleFree, lr=st.just(0.01))
    report = found(testing.check_resettable, make, reset=resets.of_the_same_shape)
    assert report.startswith("broken: a full reset leaves nothing")


def test_an_optimizer_that_steps_copies_is_found():
    report = found(testing.check_resettable, resets.Masters)
    assert "steps its own copies of the Parameters" in report
    assert_code_repeats_it(report)


SCHEDULES = {
    schedules.Recursive: "outside the ramps it is the smooth schedule's",
    schedules.unmoved: "the rate at each restart is zero",
    schedules.one_step_late: "the rate at each restart is zero",
    schedules.Deaf: "a rate that is changed by hand is kept",
}


@pytest.mark.parametrize("jagged", SCHEDULES, ids=lambda jagged: jagged.__name__)
def test_a_bug_of_a_schedule_is_found(jagged):
    exponential = testing.strategies.calls(
        torch.optim.lr_scheduler.ExponentialLR, gamma=st.just(0.9)
    )
    report = found(testing.check_schedule, jagged, inner=exponential)
    assert report.startswith(f"broken: {SCHEDULES[jagged]}")
    assert_code_repeats_it(report)


def test_a_schedule_that_fails_over_one_of_torch_s_is_found():
    sequences = testing.strategies.calls(
        testing.examples.warmup_then_cosine, milestone=st.integers(1, 9)
    )
    report = found(testing.check_schedule, schedules.Recursive, inner=sequences)
    assert "NotImplementedError" in report
    assert "testing.examples.warmup_then_cosine(optimizer, milestone=1)" in report
    assert_code_repeats_it(report)


def test_a_schedule_that_forgets_the_inner_one_s_state_is_found():
    report = found(testing.check_schedule, schedules.Forgetful)
    assert report.startswith("broken: it resumes exactly from any step")
    assert_code_repeats_it(report)


RESTARTS = [
    restarts.without_scale,
    restarts.redrawn_first,
    restarts.unpruned,
    restarts.of_B_alone,
    restarts.drawn_from_the_global_generator,
]


@pytest.mark.parametrize("restart", RESTARTS, ids=lambda restart: restart.__name__)
def test_a_bug_of_a_whole_restart_is_found(restart):
    report = found(testing.check_restart, restart)
    assert report.startswith("broken: a training is Algorithm 1, whatever interrupts it")
    drawn = restart is restarts.drawn_from_the_global_generator
    assert_code_repeats_it(report, figures=not drawn)


LEFTOVERS = {
    restarts.with_old_gradients: "no gradient of the old factors is used",
    restarts.of_trained_factors_alone: "moments of frozen factors are reset",
    restarts.of_the_first: "several optimizers are all reset",
}


@pytest.mark.parametrize("restart", LEFTOVERS, ids=lambda restart: restart.__name__)
def test_what_outlives_a_restart_is_found(restart):
    report = found(testing.check_restart, restart, skip=[_ALGORITHM])
    assert report.startswith(f"broken: {LEFTOVERS[restart]}")
    assert_code_repeats_it(report)


@pytest.mark.parametrize(
    "prop", ["what shares W keeps its value", "one that is broken off is finished or refused"]
)
def test_what_a_tutorial_s_restart_breaks_is_found(prop):
    others = [other for other in _LEFTOVERS if other != prop]
    report = found(testing.check_restart, restarts.by_hand, skip=[_ALGORITHM, *others])
    assert report.startswith(f"broken: {prop}")
    assert_code_repeats_it(report)


def test_a_weight_that_a_function_hides_is_found():
    """The factory makes a plain module: the kit gives it sites."""
    report = found(testing.check_low_rank, layers.fused)
    assert "does not require grad" in report
    assert_code_repeats_it(report)


def test_an_export_that_trusts_names_is_found(monkeypatch):
    def by_name(model):
        return model.state_dict()

    monkeypatch.setattr(lifetimes, "merged_state_dict", by_name)
    report = found(testing.check_low_rank, lambda: torch.nn.Linear(3, 2))
    assert report.startswith("broken: an export is the plain module's, merged")


def test_the_page_shows_what_its_example_says(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/how-to/prove-your-own.md").read_text()
    files = dict(re.findall(r"```python file=(\S+)\n(.*?)```", page, re.DOTALL))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    test = importlib.import_module("test_my_layer").test_my_layer
    report = found(test)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert shown == report + "\n"
    assert_code_repeats_it(report)

    repaired = files["my_layer.py"].replace("+= self.lora_B", "+= self.scale * self.lora_B")
    (tmp_path / "my_layer.py").write_text(repaired)
    for name in ("my_layer", "test_my_layer"):
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    report = found(importlib.import_module("test_my_layer").test_my_layer)
    assert report.startswith("broken: a redraw depends on its key alone")

"""A caller's mistake is reported as one, sound code passes, and small bugs are found too."""

import functools
import math
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import relora_core as relora
from relora_core import testing
from tests.kit.findings import adamw, assert_code_repeats_it, found
from tests.kit.planted import layers, resets, restarts, schedules

FEW = hypothesis.settings(testing.CI, max_examples=5)


class Misnamed(layers.Layer):
    """One name is another: it is no site, and its merge would never be checked."""

    def __init__(self):
        super().__init__()
        self.scaling = self.scale
        del self.scale


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class Nothing(nn.Linear):
    def forward(self, x):
        return None


class TestOfTheEnvironment:
    def test_no_profile_depends_on_where_it_is_imported(self):
        """Hypothesis has another default profile where CI is set."""
        program = "from relora_core import testing; print(testing.CI, testing.DEEP)"
        said = {
            subprocess.run(
                [sys.executable, "-c", program],
                env=environment,
                capture_output=True,
                check=True,
                text=True,
            ).stdout
            for environment in ({}, {"CI": "true"})
        }
        assert len(said) == 1

    def test_a_profile_that_prints_blobs_leaves_the_program_alone(self):
        blobs = hypothesis.settings(testing.CI, print_blob=True)
        with pytest.raises(testing.PropertyError) as caught:
            testing.check_restart(restarts.unpruned, profile=blobs)
        assert_code_repeats_it(str(caught.value))


class TestOfTheCaller:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (nn.Linear(3, 2), TypeError, "make must be a factory, .* got Linear"),
            (lambda: 3, TypeError, "make must return an nn.Module; got int"),
            (functools.partial(lambda m: m, nn.Linear(3, 2)), ValueError, "got the same one twice"),
            (Misnamed, TypeError, "Misnamed '' must have .* but lacks scale"),
            (Tied, ValueError, "tied"),
            (lambda: nn.LayerNorm(3), ValueError, "matches no module"),
            (lambda: Nothing(3, 2), TypeError, "must return floating-point tensors"),
        ],
    )
    def test_a_wrong_factory_is_refused(self, make, error, message):
        with pytest.raises(error, match=message) as caught:
            testing.check_low_rank(make)
        assert not isinstance(caught.value, testing.PropertyError)

    def test_inputs_that_are_no_tensors_are_refused(self):
        with pytest.raises(TypeError, match=r"a tensor or a tuple of tensors.* got dict"):
            testing.check_low_rank(
                lambda: nn.Linear(3, 2), inputs=lambda model: {"input": torch.ones(1, 3)}
            )

    def test_promises_to_skip_are_spelt_as_they_are(self):
        with pytest.raises(ValueError, match="skip must be a list of properties"):
            testing.check_schedule(relora.JaggedLR, skip=["the rate"])

    def test_those_to_skip_are_not_looked_at(self):
        skipped = ["a redraw depends on its key alone", "saving and loading commute with restarts"]
        held = testing.check_low_rank(layers.GlobalDraw, skip=skipped, profile=FEW)
        assert len(held) == 9
        assert not {one.property for one in held} & set(skipped)

    def test_views_in_place_of_parameters_are_refused(self):
        class Transposed(layers.Layer):
            weight = property(lambda self: self.kernel.T)

            def __init__(self):
                nn.Module.__init__(self)
                self.kernel = nn.Parameter(torch.randn(3, 2), requires_grad=False)
                self.lora_A = nn.Parameter(torch.randn(1, 3))
                self.lora_B = nn.Parameter(torch.zeros(2, 1))
                self.scale = 1.0

        report = found(testing.check_low_rank, Transposed)
        assert "TypeError: W and B of '' must be Parameters or buffers of the model" in report

    def test_the_global_generator_is_left_alone(self):
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        testing.check_low_rank(lambda: nn.Linear(3, 2), profile=FEW)
        testing.check_resettable(adamw, profile=FEW, prune_ratios=st.just(0.5))
        testing.check_schedule(relora.JaggedLR, profile=FEW)
        testing.check_restart(profile=FEW)
        testing.lived(lambda: nn.Linear(3, 2), ["forward"], inputs=lambda m: torch.randn(1, 3))
        assert torch.equal(torch.random.get_rng_state(), before)


class Attention(nn.Module):
    """Its keys' bias has no gradient but rounding."""

    def __init__(self):
        super().__init__()
        self.in_features = 4
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class Masked(nn.Module):
    """Outputs that are infinite on purpose."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(x).masked_fill(torch.arange(4) > 2, -math.inf)


class Rare(nn.Module):
    """An expert that no input reaches."""

    def __init__(self):
        super().__init__()
        self.usual, self.rare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.usual(x) + 0 * self.rare(x)


class WithExtraState(nn.Linear):
    """What torch lets it be: no tensor."""

    def __init__(self):
        super().__init__(3, 2)

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


class InHalfTheWidth(layers.Layer):
    """Merges in float32 whatever its dtype is, at a small scale."""

    def __init__(self):
        super().__init__(inner=4, out=5, rank=2, alpha=0.01)

    @torch.no_grad()
    def merge_(self):
        self.weight += (self.scale * (self.lora_B.float() @ self.lora_A.float())).to(
            self.weight.dtype
        )
        self.lora_B.zero_()


class TestOfNobody:
    @pytest.mark.parametrize("make", [Attention, Rare, InHalfTheWidth, WithExtraState])
    def test_a_sound_module_raises_no_alarm(self, make):
        testing.check_low_rank(make, profile=FEW)

    def test_a_masked_output_is_compared_where_it_is_finite(self):
        model = relora.add_low_rank_(Masked(), "*", rank=1)
        testing.assert_merge_keeps_function(model, torch.randn(2, 3))

    def test_a_reset_of_the_step_or_at_random_can_be_said_to_be_one(self):
        def anew(optimizer, params, ratio):
            relora.reset_optimizer_(optimizer, params, prune_ratio=ratio, reset_step=True)

        def at_random(optimizer, params, ratio):
            relora.reset_optimizer_(optimizer, params, prune_ratio=ratio, rule="random")

        options = {"prune_ratios": st.sampled_from([0.5, 1.0]), "profile": FEW}
        skip = ["the step after a reset is bounded"]  # Adam's first step is lr, whatever it was
        testing.check_resettable(adamw, reset=anew, keeps_counts=False, skip=skip, **options)
        testing.check_resettable(adamw, reset=at_random, by_magnitude=False, **options)
        assert "of magnitude" in found(testing.check_resettable, adamw, reset=at_random)
        assert "step count" in found(testing.check_resettable, adamw, reset=anew)

    def test_what_did_not_apply_is_not_among_what_held(self):
        class Own(torch.optim.SGD):
            pass

        relora.declare_moments(Own, ["momentum_buffer"], clock={})
        held = testing.check_resettable(functools.partial(Own, lr=0.1), profile=FEW)
        assert "moments that hold NaN are refused" not in {one.property for one in held}


RAMPS = {
    schedules.OneStepShort: "inside a ramp it lies between, and rises from each restart",
    schedules.NeverBack: "outside the ramps it is the smooth schedule's",
    schedules.TellsAnother: "it tells the rate that it sets",
}


class TestOfASchedule:
    def test_a_sound_one_raises_no_alarm(self):
        kept = "a rate that is changed by hand is kept as the smooth schedule keeps it"
        testing.check_schedule(schedules.Scaled, skip=["it resumes exactly from any step", kept])

    @pytest.mark.parametrize("jagged", RAMPS, ids=lambda jagged: jagged.__name__)
    @pytest.mark.parametrize("restarts", [None, relora.Restarts(200, 50)], ids=["any", "long"])
    def test_a_small_one_is_found(self, jagged, restarts):
        report = found(testing.check_schedule, jagged, restarts=restarts)
        assert report.startswith(f"broken: {RAMPS[jagged]}")
        assert_code_repeats_it(report)


class Counting(torch.optim.SGD):
    """Momentum with a count of its own."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.state:
            self.state[p]["t"] = self.state[p].get("t", 0) + 1


class Undeclared(torch.optim.SGD):
    """Its state is nobody's that is known: the layout of SGD lacks a key."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.state:
            self.state[p]["mine"] = 1


def wiping(optimizer, params, ratio):
    for p in params:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def forgetting_the_count(optimizer, params, ratio):
    relora.reset_optimizer_(optimizer, params, prune_ratio=ratio)
    for p in params:
        optimizer.state[p]["t"] = 0


class BufferCleared(layers.Layer):
    @torch.no_grad()
    def merge_(self):
        super().merge_()
        self.restart.zero_()


class TestOfAReset:
    def test_wiping_at_any_ratio_is_found_without_a_declaration(self):
        make = testing.strategies.calls(Undeclared, lr=st.just(0.1), momentum=st.just(0.9))
        report = found(testing.check_resettable, make, reset=wiping)
        assert report.startswith("broken: a ratio zeroes its share")
        assert_code_repeats_it(report)

    def test_a_count_by_another_name_must_stay(self):
        relora.declare_moments(Counting, ["momentum_buffer"], clock={"t": 0})
        make = testing.strategies.calls(Counting, lr=st.just(0.1), momentum=st.just(0.9))
        testing.check_resettable(make, profile=FEW)
        report = found(testing.check_resettable, make, reset=forgetting_the_count)
        assert report.startswith("broken: a reset leaves all else")

    def test_a_buffer_that_a_merge_clears_is_found(self):
        report = found(testing.check_low_rank, BufferCleared)
        assert "a merge changed 'restart', which is neither W nor a factor" in report


class TestTheProgram:
    """It runs by itself, whatever the factory is."""

    def test_of_lambdas_and_what_they_use(self):
        alpha = 2.0
        report = found(
            testing.check_low_rank,
            lambda: layers.MergeWithoutScale(alpha=alpha),
            inputs=lambda model: torch.randn(3, model.lora_A.shape[1]),
        )
        assert "alpha = 2.0" in report
        assert_code_repeats_it(report)

    def test_of_local_classes_and_functions(self):
        class Inner(layers.MergeWithoutScale):
            pass

        def make():
            return Inner(alpha=4.0)

        report = found(testing.check_low_rank, make)
        assert "class Inner(layers.MergeWithoutScale)" in report
        assert_code_repeats_it(report)

    def test_of_partials(self):
        make = functools.partial(torch.optim.AdamW, lr=0.01)
        report = found(testing.check_resettable, make, reset=resets.nothing)
        assert "functools.partial(torch.optim.AdamW, lr=0.01)" in report
        assert_code_repeats_it(report)

    def test_of_our_own_restart_under_another_schedule(self):
        report = found(testing.check_restart, jagged=schedules.NeverBack)
        assert "import restart_by_relora" in report
        assert_code_repeats_it(report)

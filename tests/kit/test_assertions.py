"""Each assertion by itself: a sound layer passes, a broken one does not."""

import functools
from unittest import mock

import pytest
import torch
from torch import nn

import relora_core as relora
from relora_core import testing
from relora_core.low_rank.register import remove_low_rank
from relora_core.testing.properties import roundtrips as lifetimes
from tests.kit.planted import layers


class Shared(layers.Layer):
    """A deep copy of it is itself."""

    def __deepcopy__(self, memo):
        return self


class Counted(layers.Layer):
    """It writes down how often it was called."""

    def forward(self, x):
        self.restart += 1
        return super().forward(x)


class Negated(layers.Layer):
    """Its gradient of A has the wrong sign, its output is right."""

    def forward(self, x):
        A = 2 * self.lora_A.detach() - self.lora_A
        return x @ self.weight.T + self.scale * (x @ A.T @ self.lora_B.T)


class Unscaled(layers.Layer):
    def forward(self, x):
        return x @ self.weight.T + x @ self.lora_A.T @ self.lora_B.T


def broken(name, layer, message):
    return pytest.param(getattr(testing, name), layer, message, id=name)


X = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
WITH_INPUTS = {
    "assert_is_dense",
    "assert_gradients_are_dense",
    "assert_merge_keeps_function",
    "assert_learns",
    "assert_copies_are_independent",
}
BROKEN = [
    broken("assert_is_dense", Unscaled, "differs from that of W"),
    broken("assert_gradients_are_dense", Negated, "gradient of '.lora_A' differs"),
    broken("assert_merge_keeps_function", layers.MergeWithoutScale, "a merge changed the output"),
    broken("assert_merge_adds_update", layers.MergeThroughHalf, "differs from W"),
    broken("assert_merge_is_idempotent", layers.MergeKeepsB, "a second merge changed 'weight'"),
    broken("assert_merges_add_up", layers.SixteenBitsRoundedOnce, "lost"),
    broken("assert_redraw_is_keyed", layers.GlobalDraw, "drew different A"),
    broken("assert_learns", layers.ZeroFactors, "lora_B of '' has no gradient before"),
    broken("assert_rank_grows", layers.SameDraw, "redraw A at each restart"),
    broken("assert_copies_are_independent", Counted, "a forward pass changed 'restart'"),
]


def test_inputs_in_float64_are_left_alone():
    x = X.double()
    testing.assert_gradients_are_dense(layers.Layer(inner=7), x)
    assert not x.requires_grad


@pytest.mark.parametrize(("assertion", "layer", "message"), BROKEN)
def test_it_tells_sound_from_broken(assertion, layer, message):
    options = {"inner": 7, "out": 8, "rank": 2, "alpha": 4.0}
    x = [X] if assertion.__name__ in WITH_INPUTS else []
    events = [] if layer is layers.ZeroFactors else ["fill"]
    assertion(testing.lived(functools.partial(layers.Layer, **options), events), *x)
    model = testing.lived(functools.partial(layer, **options), events)
    with pytest.raises(testing.PropertyError, match=message):
        assertion(model, *x)


def test_a_copy_that_is_the_model_is_no_copy():
    with pytest.raises(testing.PropertyError, match="a merge of a deep copy changed"):
        testing.assert_copies_are_independent(Shared(inner=7), X)


def test_a_state_dict_that_lacks_the_count_is_not_all():
    with pytest.raises(testing.PropertyError, match="restart 1 after saving and loading"):
        testing.assert_saves_and_loads(layers.CountIsNotSaved(), layers.CountIsNotSaved, X[:, :3])


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (functools.partial(remove_low_rank, merge=False), "changed the output"),
        (lambda module, name: replaced(remove_low_rank(module, name)), "or replaced it by another"),
    ],
    ids=["forgets to merge", "puts another Parameter there"],
)
def test_a_removal_that_does_not_cancel_is_none(breaks, message):
    model = testing.lived(lambda: relora.register_low_rank(nn.Linear(7, 2), rank=1), ["fill"])
    testing.assert_removal_cancels(model, X)
    with (
        mock.patch.object(lifetimes, "remove_low_rank", lambda m, n, merge=True: breaks(m, n)),
        pytest.raises(testing.PropertyError, match=message),
    ):
        testing.assert_removal_cancels(model, X)


def replaced(module):
    module.weight = nn.Parameter(module.weight.detach().clone())
    return module

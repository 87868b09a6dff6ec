"""Torch's averages of a model with sites are averages of its merged weights."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import relora_core as relora
from tests.core.models import backward, low_rank, net, trained
from tests.reference import randomize_


class TestOfSites:
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

    def test_are_torch_s_in_class_copies_and_states(self):
        model = low_rank()
        averaged = AveragedModel(model)
        assert type(averaged) is AveragedModel
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
            def update_parameters(self, model):
                self.calls = getattr(self, "calls", 0) + 1
                super().update_parameters(model)

        model = low_rank()
        averaged = Mine(model)
        randomize_(model)
        x = torch.randn(3, 6)
        averaged.update_parameters(model)
        torch.testing.assert_close(averaged(x), model(x))
        assert averaged.calls == 1

    def test_are_exported_under_plain_names(self):
        model = low_rank()
        averaged = AveragedModel(model)
        randomize_(model)
        averaged.update_parameters(model)
        plain, x = net(), torch.randn(3, 6)
        plain.load_state_dict(relora.merged_state_dict(averaged))
        torch.testing.assert_close(plain(x), averaged(x))

    def test_over_split_bases_are_refused(self):
        model = low_rank()
        averaged = AveragedModel(model)
        relora.split_bases_(model)
        with pytest.raises(ValueError, match="would be rounded to 16 bits"):
            averaged.update_parameters(model)


class TestMadeBeforeTheSites:
    """An average over the warm start goes on over ReLoRA, of the plain weights."""

    @pytest.mark.parametrize("use_buffers", [False, True])
    def test_go_on_with_merged_weights(self, use_buffers):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5, bias=False))
        rule = get_ema_multi_avg_fn(0.8)
        averaged = AveragedModel(model, multi_avg_fn=rule, use_buffers=use_buffers)
        expected = {}
        optimizer = torch.optim.AdamW(trained(model), lr=3e-2)
        for step in range(8):
            if step == 2:
                relora.add_low_rank_(model, ["0", "2"], rank=2)
                optimizer = torch.optim.AdamW(trained(model), lr=3e-2)
            if step in (5, 7):
                relora.restart_(model, optimizer)
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(model)
            for key, value in relora.merged_state_dict(model).items():
                moves = step and (use_buffers or "running" not in key) and "num" not in key
                before = expected.get(key, value)
                expected[key] = (0.8 * before + 0.2 * value if moves else value).clone()
        found = averaged.module.state_dict()
        for key, value in expected.items():
            if "num" not in key:
                torch.testing.assert_close(found[key], value)

    def test_of_a_plain_model_are_what_torch_makes_of_it(self):
        plain = net()
        averaged = AveragedModel(plain)
        averaged.update_parameters(plain)
        for p, q in zip(averaged.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)

    @pytest.mark.parametrize(
        "through", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
    )
    def test_of_copies_too(self, through):
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        averaged = through(AveragedModel(model))
        relora.add_low_rank_(model, "*", rank=2)
        randomize_(model)
        averaged.update_parameters(model)
        x = torch.randn(3, 6)
        torch.testing.assert_close(averaged(x), model(x))

    def test_of_parts_that_get_their_sites_later(self):
        model = relora.add_low_rank_(net(), "0", rank=2)
        averaged = AveragedModel(model)
        relora.add_low_rank_(model, "2", rank=2)
        randomize_(model)
        averaged.update_parameters(model)
        x = torch.randn(3, 6)
        torch.testing.assert_close(averaged(x), model(x))

    def test_of_sites_that_are_removed(self):
        model = low_rank()
        averaged = AveragedModel(model)
        randomize_(model)
        for layer in (model[0], model[2]):
            relora.remove_low_rank(layer)
        averaged.update_parameters(model)
        x = torch.randn(3, 6)
        torch.testing.assert_close(averaged(x), model(x))

    def test_of_another_model_are_refused(self):
        averaged = AveragedModel(net())
        before = copy.deepcopy(averaged.state_dict())
        other = relora.add_low_rank_(nn.Sequential(nn.Linear(6, 8)), "*", rank=2)
        with pytest.raises(
            ValueError,
            match=r"has 2.weight with shape \(5, 8\), but Sequential lacks it",
        ):
            averaged.update_parameters(other)
        assert all(torch.equal(v, before[k]) for k, v in averaged.state_dict().items())

    def test_of_a_model_of_another_shape_are_refused(self):
        averaged = AveragedModel(nn.Sequential(nn.Linear(6, 4)))
        other = relora.add_low_rank_(nn.Sequential(nn.Linear(6, 5)), "*", rank=2)
        with pytest.raises(ValueError, match=r"Sequential has it with shape \(5, 6\)"):
            averaged.update_parameters(other)

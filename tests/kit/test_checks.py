"""Every property of the kit, over all of our own layers, optimizers, schedules and restarts."""

import importlib

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import relora_core as relora
from relora_core import testing
from relora_core.testing.__main__ import main
from relora_core.testing.self_check import CHECKS
from tests.core.models import ByOperators
from tests.core.optim.optimizers import OPTIMIZERS, quiet_and_eager


@pytest.mark.parametrize("name", CHECKS)
def test_ours_have_every_property(name):
    assert all(held.examples for held in CHECKS[name](testing.CI))


FEW = hypothesis.settings(testing.CI, max_examples=4)
ROWS = {name: row for name, row in OPTIMIZERS.items() if "reset" not in row.refused}


@pytest.mark.parametrize("name", ROWS)
def test_every_optimizer_of_the_table_can_be_reset(name):
    row = ROWS[name]
    if "cpu" not in row.devices:
        pytest.skip("it runs on a GPU only")
    if row.sparse:
        pytest.skip("the kit gives dense gradients, which it refuses")
    library, _, kind = row.path.rpartition(".")
    pytest.importorskip(library.split(".")[0], reason=f"{library} is not installed")
    function = getattr(importlib.import_module(library), kind, None)
    if function is None:
        pytest.skip(f"torch {torch.__version__} has no {kind}")
    options = {key: st.just(value) for key, value in {"lr": 0.01, **row.options}.items()}
    ratios = st.just(1.0) if "prune" in row.refused else testing.strategies.ratios()
    with quiet_and_eager():
        held = testing.check_resettable(
            testing.strategies.calls(function, **options),
            prune_ratios=ratios,
            sizes=st.just(row.shapes),
            profile=FEW,
        )
    assert len(held) == (7 if row.moments else 6)  # NaN is looked for in moments


class Projections(nn.Module):
    """PEFT's layer, as the kit wants to see it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # not a child: it is the model's

    weight = property(lambda self: self.layer[0].base_layer.weight)
    lora_A = property(lambda self: self.layer[0].lora_A["default"].weight)
    lora_B = property(lambda self: self.layer[0].lora_B["default"].weight)
    scale = property(lambda self: self.layer[0].scaling["default"])

    @torch.no_grad()
    def merge_(self):
        self.weight.add_(self.layer[0].get_delta_weight("default"))
        self.lora_B.zero_()

    @torch.no_grad()
    def redraw_(self):
        self.layer[0].reset_lora_parameters("default", True)


def peft_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    return peft.get_peft_model(nn.Sequential(nn.Linear(5, 4)), config)


def peft_sites(model):
    return {name: Projections(m) for name, m in model.named_modules() if hasattr(m, "base_layer")}


def test_layers_of_another_library_can_be_checked():
    """PEFT's merge is right; its draws come from the global generator, and the kit says so."""
    with pytest.raises(testing.PropertyError) as caught:
        testing.check_low_rank(peft_model, sites=peft_sites, inputs=lambda model: torch.randn(3, 5))
    report = str(caught.value)
    assert report.startswith("broken: a redraw depends on its key alone")
    assert "held: a merge adds s B A to W, rounds once, and zeroes B (40 examples)" in report
    assert "sites=peft_sites" in report


class TestPlainModules:
    def test_of_any_form_are_given_sites(self):
        held = testing.check_low_rank(
            ByOperators, inputs=lambda model: torch.randn(3, 4), profile=FEW
        )
        assert len(held) == 13
        block = testing.strategies.Call(nn.TransformerEncoderLayer, (4, 2, 5))
        held = testing.check_low_rank(
            block,
            targets=["*linear*"],
            inputs=lambda model: torch.randn(2, 3, 4),
            profile=FEW,
        )
        assert len(held) == 13

    def test_of_recurrent_layers_compute_with_the_sum(self):
        def lstm():
            return relora.register_low_rank(nn.LSTM(3, 2), "weight_ih_l0", rank=1)

        assert len(testing.check_low_rank(lstm, profile=FEW)) == 13


class TestCommand:
    def test_runs_the_checks_and_writes_what_held(self, tmp_path, capsys):
        out = tmp_path / "properties.jsonl"
        names = ["JaggedCosine", "low-rank modules"]
        assert main(["--only", *names, "--examples", "3", "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert "       3  JaggedCosine: the rate at each restart is zero\n" in said
        assert said.endswith("      57  examples, no property broken\n")
        assert out.read_text().splitlines()[-1] == '{"examples": 57, "broken": 0}'

    def test_says_what_is_broken_and_writes_nothing(self, tmp_path, capsys, monkeypatch):
        def breaks(profile):
            return testing.check_schedule(lambda inner, restarts: inner, profile=profile)

        monkeypatch.setitem(CHECKS, "JaggedCosine", breaks)
        out = tmp_path / "properties.jsonl"
        assert main(["--only", "JaggedCosine", "--out", str(out)]) == 1
        assert capsys.readouterr().out.startswith("broken: the rate at each restart is zero\n")
        assert not out.exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--examples", "0"], "--examples must be at least 1; got 0"),
            (["--only", "everything"], "invalid choice: 'everything'"),
            (["--out", "."], "exists already: give --out another name"),
        ],
    )
    def test_refuses_what_is_wrong(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err

"""The study's trials: what the arms have in common, what they differ in, and what is on file."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_study import main
from study import plans
from study import run_trial as running
from study.trial import Arm, Trial
from torch.optim.lr_scheduler import LambdaLR

from reference_trainer.config import DataConfig
from reference_trainer.data.batches import Batches
from reference_trainer.data.index import read_index
from reference_trainer.data.prepare import prepare
from reference_trainer.data.windows import open_windows
from reference_trainer.errors import Stopped, UserError
from reference_trainer.model.llama import Llama
from reference_trainer.parallelize import init_weights_
from reference_trainer.phases import Envelope
from tests.trainer.runs import SOURCES

FULL = Arm("full rank", 4e-3)
LORA = Arm("LoRA + warm start", 4e-3, rank=2, lr_multiple=8.0)
RELORA = replace(LORA, name="ReLoRA + warm start", cycles=3)
STEPS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study") / "data"
    directory.mkdir()
    prepare(DataConfig(files=(SOURCES,), held_out=0.2), directory)
    return directory


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Evaluate on few windows, and warm up within a cycle."""
    monkeypatch.setattr(running, "WINDOWS", 4)
    monkeypatch.setattr(running, "WARMUP", 2)


def trial(arm, seed=0):
    return Trial("1m", arm, seed, STEPS, sequences=2, length=32)


@pytest.fixture(scope="module")
def records(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(running, "WINDOWS", 4)
        patched.setattr(running, "WARMUP", 2)
        return {
            arm.name: running.run_trial(trial(arm), data, runs, compiled=False)
            for arm in (FULL, LORA, RELORA)
        }


class TestATrial:
    def test_of_full_rank_is_a_plain_loop(self, data, records):
        model = Llama(trial(FULL).shape)
        named = dict(model.named_parameters())
        init_weights_(named, hidden_size=128, seed=0)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        schedule = LambdaLR(optimizer, Envelope(0, STEPS, 2, 0.1))
        batches = Batches(open_windows(data, read_index(data), "train", 32), 2, 0)
        for step in range(STEPS):
            batch = batches.at(step)
            loss = model(batch[:, :-1], batch[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step + 1 in (6, STEPS):  # at the end of what is shared, and of all
                (found,) = (
                    point for point in records["full rank"]["curve"] if point[0] == step + 1
                )
                assert loss.item() == found[2]

    def test_begins_as_the_others_of_its_seed(self, records):
        curves = [record["curve"][:6] for record in records.values()]
        assert curves[0] == curves[1] == curves[2]
        assert len({record["curve"][-1][1] for record in records.values()}) == 3

    def test_writes_down_the_rank_after_each_cycle(self, records):
        assert {tuple(ranks) for ranks in records["LoRA + warm start"]["ranks"].values()} == {(2,)}
        assert {tuple(r) for r in records["ReLoRA + warm start"]["ranks"].values()} == {(2, 4, 6)}
        for record in records.values():
            assert len(record["ranks"]) == len(record["spectra"]) == 35
            for name, values in record["spectra"].items():
                last = record["ranks"][name][-1:]
                assert len(values) == last[0] if last else len(values) > 100, name
                assert values == sorted(values, reverse=True)

    @given(steps=st.integers(1000, 10_000), cycles=st.integers(1, 16))
    def test_has_as_many_cycles_as_its_arm_says(self, steps, cycles):
        of = Trial("1m", replace(RELORA, cycles=cycles), 0, steps)
        restarts = sum(step % of.period == 0 for step in range(1, steps - of.warm_steps))
        assert restarts + 1 == cycles

    def test_of_low_rank_costs_less(self, records):
        full, lora = (records[name]["flops"] for name in ("full rank", "LoRA + warm start"))
        assert 0.7 * full < lora < 0.85 * full
        assert records["ReLoRA + warm start"]["flops"] == lora

    def test_ends_where_its_loss_is_not_finite(self, data, tmp_path):
        arm = trial(replace(LORA, lr_multiple=1e30))
        broken = running.run_trial(arm, data, tmp_path, compiled=False)
        assert broken["diverged"]
        assert 6 < broken["curve"][-1][0] < STEPS
        assert not broken["spectra"]

    @pytest.mark.parametrize("part", [{"prune_ratio": None}, {"rewarm": 0.5}, {"warm_start": 0.0}])
    def test_may_lack_a_component(self, data, tmp_path, records, part):
        arm = trial(replace(RELORA, **part))
        found = running.run_trial(arm, data, tmp_path, compiled=False)
        assert found["curve"][-1] != records["ReLoRA + warm start"]["curve"][-1]
        assert {tuple(ranks) for ranks in found["ranks"].values()} == {(2, 4, 6)}


def tuning(arm, lr, multiple, loss):
    of = replace(arm, lr=lr, lr_multiple=multiple)
    key = Trial("1m", of, plans.TUNING_SEED, plans.SCALES["1m"].steps).key()
    return {"event": "trial", **key, "curve": [[1, loss, loss]], "diverged": loss != loss}


class TestThePlans:
    @settings(max_examples=20)
    @given(st.integers(-4, 4), st.integers(-4, 4), st.integers(0, 6))
    def test_each_arm_is_tuned_until_its_best_rate_lies_between_worse_ones(
        self, full, factors, worst
    ):
        scale, records, tried = plans.SCALES["1m"], [], 0

        def loss(arm):
            off = math.log2(arm.lr / plans.RATE) - full
            if arm.rank:
                off = math.log2(arm.lr_multiple / plans.MULTIPLE) - factors
            return 1.0 + abs(off) if off <= worst else float("nan")

        while todo := plans.left(plans.tune(scale, records), records):
            arm = todo[0].arm
            assert arm.name == "full rank" or arm.lr == plans.RATE * 2**full
            records.append(tuning(arm, arm.lr, arm.lr_multiple, loss(arm)))
            tried += 1
            assert tried < 40
        names = {record["arm"] for record in records}
        assert names == {"full rank", "LoRA", "LoRA + warm start", "ReLoRA + warm start"}
        for name in names:
            chosen = plans.best(records, name)
            rate = "lr_multiple" if chosen["rank"] else "lr"
            rates = [record[rate] for record in records if record["arm"] == name]
            assert min(rates) < chosen[rate] < max(rates)
            assert chosen["curve"][-1][1] == 1.0

    def test_an_arm_is_run_at_its_own_best_rate(self):
        scale = plans.SCALES["1m"]
        records = [tuning(FULL, lr, 1.0, loss) for lr, loss in ((2e-3, 2.0), (4e-3, 1.0))]
        for arm in plans._tuned(scale):
            records += [tuning(arm, 4e-3, m, loss) for m, loss in ((8.0, 3.0), (16.0, 2.5))]
            records.append(tuning(arm, 4e-3, 32.0, float("nan")))
        for name in ("arms", "ablation", "sweeps"):
            found = plans.PLANS[name](scale, records)
            assert {t.arm.lr for t in found} == {4e-3}
            assert {t.arm.lr_multiple for t in found if t.arm.rank} == {16.0}
            assert plans.TUNING_SEED not in {t.seed for t in found}
            assert len({json.dumps(t.key()) for t in found}) == len(found)

    def test_what_is_called_after_a_warm_start_has_one(self):
        for scale in plans.SCALES.values():
            found = {arm.name: arm for arm in plans._tuned(scale)}
            assert found["LoRA"].warm_start == 0
            for name in ("LoRA + warm start", "ReLoRA + warm start"):
                assert found[name].warm_start == FULL.warm_start > 0
            assert [arm.cycles for arm in found.values()] == [1, 1, scale.cycles]

    @pytest.mark.parametrize("name", ["arms", "ablation", "sweeps"])
    def test_what_is_not_tuned_is_refused(self, name):
        with pytest.raises(UserError, match="run the plan 'tune' first"):
            plans.PLANS[name](plans.SCALES["1m"], [])

    def test_the_rank_is_a_small_share_of_the_width(self):
        for scale in plans.SCALES.values():
            assert scale.rank * 48 <= Trial(scale.model, FULL, 0, 1).shape.hidden_size


class TestTheCommand:
    @pytest.fixture
    def command(self, data, tmp_path, monkeypatch):
        monkeypatch.setitem(plans.SCALES, "1m", plans.Scale("1m", rank=2, steps=8, cycles=2))

        def once(scale, records, first, name):
            return [plans._trial(scale, first, plans.TUNING_SEED)]

        monkeypatch.setattr(plans, "_search", once)
        out = tmp_path / "out.jsonl"
        return [
            "--eager",
            "--quiet",
            "--data",
            str(data),
            "--runs",
            str(tmp_path / "runs"),
            "--out",
            str(out),
        ], out

    def test_it_runs_what_is_not_on_file_yet(self, command, capsys):
        arguments, out = command
        assert main([*arguments, "--dry-run"]) == 0
        assert "1 trials of tune can be planned now" in capsys.readouterr().out
        assert main(arguments) == 0
        lines = out.read_text().splitlines()
        assert [json.loads(line)["arm"] for line in lines] == [
            *("full rank", "LoRA", "LoRA + warm start", "ReLoRA + warm start")
        ]
        out.write_text("\n".join(lines)[:-100])  # as if interrupted in the middle of a line
        assert main(arguments) == 0
        again = out.read_text().splitlines()
        assert again[:3] == lines[:3]
        untimed = ("seconds_a_step", "date")
        last, first = (
            {**json.loads(text), **dict.fromkeys(untimed)} for text in (again[3], lines[3])
        )
        assert last == first
        capsys.readouterr()
        assert main([*arguments, "--dry-run"]) == 0
        assert "0 trials of tune can be planned now" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{\n", "cannot read"),
            ("a note without an end", "cannot read"),
            ('{"event": "bench"}\n', "must hold trials only"),
            ("[]\n", "must hold trials only"),
        ],
    )
    def test_a_file_of_another_kind_is_refused(self, command, capsys, content, message):
        arguments, out = command
        out.write_text(content)
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
        assert out.read_text() == content

    def test_a_file_that_cannot_be_written_is_refused_before_any_trial(
        self, command, capsys, monkeypatch
    ):
        arguments, _ = command
        monkeypatch.setattr("run_study.run_trial", None)
        for wrong in (
            ["--out", "/dev/null/x"],
            ["--runs", "/dev/null/x", "--data", "/dev/null/x/d"],
        ):
            assert main([*arguments, *wrong]) == 2
            assert capsys.readouterr().err.startswith("error: ")

    @pytest.mark.parametrize(("raised", "code"), [(Stopped, 75), (KeyboardInterrupt, 130)])
    def test_one_that_is_stopped_says_so_by_its_exit_code(self, command, monkeypatch, raised, code):
        def stopped(*arguments, **options):
            raise raised

        monkeypatch.setattr("run_study.run_trial", stopped)
        assert main(command[0]) == code

    def test_bad_arguments_are_refused(self, command, capsys):
        arguments, out = command
        assert main([*arguments, "--threads", "0"]) == 2
        assert "--threads must be 1 or more; got 0" in capsys.readouterr().err
        assert main([*arguments, "--plan", "arms"]) == 2
        assert "run the plan 'tune' first" in capsys.readouterr().err
        assert not out.exists()

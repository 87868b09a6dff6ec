"""The benchmark compares arms that compute the same thing, and says no more than it measured."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor

import relora_core as relora
from reference_trainer.bench import arms, memory, results
from reference_trainer.bench.workloads import subjects
from reference_trainer.config import ParallelConfig
from reference_trainer.distributed import open_world
from reference_trainer.main import main
from reference_trainer.model.llama import Block, preset, rotary_table
from tests.trainer.runs import lines_of

SHAPE = ["--model", "9m", "--layers", "1", "--vocab", "50"]
BATCH = ["--tokens", "32", "--length", "16"]
RANK = ["--rank", "4"]
LEVELS = ("linear", "block", "model")
OPTIONS = {
    **{level: ["step", "--level", level, *SHAPE, *BATCH, *RANK] for level in LEVELS},
    "restart": ["restart", *SHAPE, *RANK],
    "prune": ["prune"],
    "checkpoint": ["checkpoint", *SHAPE, *BATCH],
}


def test_all_arms_compute_the_same(monkeypatch):
    pytest.importorskip("peft")
    shape = preset("9m", vocab_size=100)
    x = torch.randn(2, 8, shape.hidden_size, dtype=torch.float64)
    table = rotary_table(8, shape, x.device)
    expected = None
    for arm in ("dense", "plain", "ours", "two-paths", "merged", "peft"):
        torch.manual_seed(0)
        block = Block(shape).double()
        arms.ARMS[arm](block, 4)
        trained = [(n, p) for n, p in block.named_parameters() if p.requires_grad]
        factors = {w: [p for n, p in trained if f"lora_{w}" in n] for w in "AB"}
        generator = torch.Generator().manual_seed(1)
        for p in factors["A"] + factors["B"]:
            nn.init.normal_(p, std=0.1, generator=generator)
        y = block(x, *table)
        y.square().sum().backward()
        rest = [p for n, p in trained if "lora" not in n]
        values = [y, *(p.grad for p in factors["A"] + factors["B"] + rest)]
        expected = expected or values
        assert len(trained) == 7 * 2 + 2
        for value, one in zip(values, expected, strict=True):
            torch.testing.assert_close(value, one, msg=arm)


@pytest.mark.parametrize("dtype", ["fp32", "mixed"])
@pytest.mark.parametrize("layout", ["shard", "replicate"])
def test_a_model_is_laid_out_as_the_trainer_lays_it(dtype, layout):
    shape = preset("9m", vocab_size=50)
    (subject,) = subjects("model", shape, dtype=dtype, sequences=1, length=16)
    with open_world(ParallelConfig("cpu")) as world:
        work = subject.work(lambda m: arms.ours_(m, 4), world, layout=layout)
        work.backward()
        for _, site in relora.low_rank_sites(work.module):
            computed = site.low_rank.merged_copy if dtype == "mixed" else site.weight
            assert isinstance(computed, DTensor) == (layout == "shard")
            assert isinstance(site.weight, DTensor) == (dtype == "mixed" or layout == "shard")
            assert site.lora_A.grad is not None


class TestCommand:
    def run(self, level, *more):
        return main(["bench", *OPTIONS[level], "--out", f"{level}.jsonl", *more])

    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
    def test_measures_every_arm_as_often_as_asked(self, level, dtype, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        given = ["full", "dense", "plain", "two-paths", "merged", "ours"]
        assert self.run(level, "--dtype", dtype, "--repeats", "2", "--arms", *given) == 0
        first, *records = results.read(tmp_path / f"{level}.jsonl")
        assert first["torch"] == torch.__version__
        assert first["dtype"] == dtype
        for _, found in results.by_subject([first, *records]):
            assert [record["arm"] for record in found] == given
            for record in found:
                assert len(record["step_seconds"]) == len(record["backward_seconds"]) == 2
                pairs = zip(record["backward_seconds"], record["step_seconds"], strict=True)
                assert all(0 < backward < step for backward, step in pairs)
                assert record["kept_bytes"] > 0
                assert record["peak_bytes"] > 4 * record["trained_parameters"]
            ours, full = found[-1], found[0]
            assert ours["trained_parameters"] != full["trained_parameters"]

    def test_prints_ratios_and_draws_from_enough_repeats(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert self.run("block", "--repeats", "7", "--arms", "full", "ours") == 0
        printed = capsys.readouterr().out
        assert "| ours |" in printed
        assert " to " in printed
        assert (tmp_path / "block.png").stat().st_size > 5000
        assert main(["bench", "show", "block.jsonl", "--picture", "again.png"]) == 0
        assert capsys.readouterr().out.splitlines()[:6] == printed.splitlines()[:6]
        assert (tmp_path / "again.png").is_file()

    def test_prints_no_ratio_from_too_few(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert self.run("block", "--repeats", "6", "--arms", "full", "ours") == 0
        printed = capsys.readouterr().out
        assert " to " not in printed.replace("ratios to full", "")
        assert "Ratios of times need at least 7 repeats" in printed
        assert not (tmp_path / "block.png").exists()

    @pytest.mark.parametrize("level", ["restart", "prune"])
    def test_times_restarts_and_pruning(self, level, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("reference_trainer.bench.commands.prune.QUANTILE", 2**10)
        assert self.run(level, "--repeats", "2") == 0
        _, *records = results.read(tmp_path / f"{level}.jsonl")
        assert all(len(record["step_seconds"]) == 2 for record in records)
        assert len(records) == {"restart": 3, "prune": 2}[level]

    def test_times_steps_beside_checkpoints(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.run("checkpoint", "--repeats", "2", "--every", "2") == 0
        _, alone, beside = results.read(tmp_path / "checkpoint.jsonl")
        assert beside["arm"] == "a checkpoint"
        assert len(alone["step_seconds"]) == len(beside["step_seconds"]) == 2
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.jsonl"]  # no checkpoint is left

    def test_counts_without_writing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        count = ["bench", "step", "--level", "model", "--count", "--dtype", "bf16"]
        assert main([*count, "--arms", "full", "ours"]) == 0
        assert "(0.786)" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())

    def test_compiled_arms_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.run("linear", "--repeats", "1", "--arms", "full", "ours-compiled") == 0

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--arms", "full", "lora"], "--arms must be among full, dense"),
            (["--arms", "full", "full"], "--arms must name each arm once"),
            (["--tokens", "33"], "--tokens must be a multiple of --length; got tokens=33"),
            (["--rank", "129"], "--rank must be at most 128, the model's width; got 129"),
            (["--level", "restart"], "invalid choice: 'restart'"),
            (["--repeats", "0"], "must be at least 1; got 0"),
            (["--model", "2b"], "invalid choice: '2b'"),
            (["--device", "cuda"], "torch sees no CUDA device"),
            (["--dtypes", "fp32"], "unknown option --dtypes"),
            (["--layout", "replicate"], "--layout needs --level model; got --level block"),
            (
                ["--checkpoint-activations", "full"],
                "--checkpoint-activations needs --level model; got --level block",
            ),
        ],
    )
    def test_refuses_what_is_wrong(self, given, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert self.run("block", *given) == 2
        error = lines_of(capsys.readouterr().err)
        assert len(error) == 1
        assert message in error[0]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("file", ["none.jsonl", __file__])
    def test_shows_no_file_that_is_no_measurement(self, file, capsys):
        assert main(["bench", "show", file]) == 2
        assert f"cannot read {file}" in capsys.readouterr().err

    def test_refuses_to_overwrite(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "block.jsonl").write_text("{}")
        assert self.run("block") == 2
        assert "block.jsonl exists already: give --out another name" in capsys.readouterr().err
        assert (tmp_path / "block.jsonl").read_text() == "{}"

    def test_refuses_several_processes(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert self.run("block") == 2
        assert "start it without torchrun" in capsys.readouterr().err

    def test_says_what_to_install_for_peft(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(arms, "find_spec", lambda name: None)
        assert self.run("block", "--arms", "full", "peft") == 2
        assert "pip install peft" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestRatios:
    @given(st.lists(st.floats(0.1, 10), min_size=7, max_size=20), st.floats(0.5, 2))
    def test_are_of_one_round_each(self, baseline, factor):
        """What slows a round slows both, and leaves their ratio."""
        found = results.ratio([factor * second for second in baseline], baseline)
        assert found.low == pytest.approx(factor)
        assert found.high == pytest.approx(factor)

    def test_tables_say_where_they_were_made(self):
        first = {"event": "bench", "device": "a CPU", "threads": 2, "torch": "9", "date": "2026"}
        arm = {"event": "arm", "subject": "s", "step_seconds": [2.0] * 7}
        table = results.table([first, arm | {"arm": "full"}, arm | {"arm": "ours"}])
        assert table.startswith("a CPU, 2 threads, torch 9")
        assert "| ours | 2,000 ms | 1.000 (1.000 to 1.000) |" in table

    def test_a_file_holds_every_repeat(self, tmp_path):
        records = [{"event": "bench"}, {"event": "arm", "step_seconds": [0.5, 0.25]}]
        results.write(records, tmp_path / "b.jsonl")
        lines = (tmp_path / "b.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == records == results.read(tmp_path / "b.jsonl")


class TestMemory:
    def test_what_autograd_keeps_is_counted_once_and_without_parameters(self):
        layer = nn.Linear(8, 4)
        x = torch.randn(10, 8, requires_grad=True)
        assert memory.kept_bytes(layer, lambda: layer(x) + layer(x)) == 10 * 8 * 4

    def test_the_peak_is_that_of_all_that_lives_at_once(self):
        def run():
            one = torch.empty(1000, 1000)
            two = torch.empty(1000, 1000)
            del one
            return two, torch.empty(500, 1000)

        assert memory.peak_bytes(run, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)

    def test_state_is_parameters_and_moments(self):
        layer = nn.Linear(8, 4, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
        assert memory.state_bytes(layer, optimizer) == 8 * 4 * 4
        layer(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        assert memory.state_bytes(layer, optimizer) == 2 * 8 * 4 * 4

"""`estimate`: the peak for any number of sequences, what fits, and the advice."""

import dataclasses
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from reference_trainer.bench.communication import sent_at_depth, sent_in_restart, sent_in_step
from reference_trainer.bench.estimate import command
from reference_trainer.bench.estimate import row as rows_of_layouts
from reference_trainer.bench.estimate.depth import track_at_depth
from reference_trainer.bench.estimate.gpus import GPUS, GiB
from reference_trainer.bench.estimate.peaks import Peak, estimate_peak
from reference_trainer.bench.layouts import LAYOUTS, Step, layouts, pretended
from reference_trainer.bench.tracker import track
from reference_trainer.config import CHECKPOINTING
from reference_trainer.main import main
from reference_trainer.model.llama import LlamaShape
from tests.trainer.runs import lines_of

SHAPE = LlamaShape(64, 96, 2, 4, 4, 800)  # of few sequences the head's gradient is the largest
DEEP = dataclasses.replace(SHAPE, layers=6)
FULL, SHARD, *_ = (Step(layout, SHAPE, rank=8, length=16) for layout in LAYOUTS)
SMALL = ["estimate", "--model", "9m", "--world-size", "2", "--vocab", "300", "--length", "64"]
SMALL += ["--rank", "16"]


class TestPeak:
    @pytest.mark.parametrize("recompute", CHECKPOINTING)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    def test_of_any_number_of_sequences_is_what_a_track_of_them_finds(self, layout, recompute):
        step = Step(layout, SHAPE, rank=8, length=16, recompute=recompute)
        peak = estimate_peak(step, processes=2)
        for sequences in (3, 20):
            found = track(dataclasses.replace(step, sequences=sequences), processes=2)
            assert peak.at(sequences) == found.peak

    def test_lies_elsewhere_with_few_sequences_than_with_many(self):
        """So that a straight line through two peaks would be wrong."""
        peak = estimate_peak(dataclasses.replace(FULL, recompute="full"), processes=2)
        assert peak.at(2) - peak.at(1) < 0.5 * (peak.at(20) - peak.at(19))

    def test_what_fits_is_the_most_that_does(self):
        peak = estimate_peak(SHARD, processes=2)
        for room in (peak.at(1), peak.at(3) + 1, 1e8, 1e9):
            most = peak.most(room)
            assert peak.at(most) <= room < peak.at(most + 1)
        assert peak.most(peak.at(0) - 1) == 0

    def test_smaller_moments_take_as_much_less(self):
        full, half = (estimate_peak(FULL, processes=2, moments=share) for share in (1.0, 0.5))
        assert half.optimizer == full.optimizer / 2
        assert full.at(9) - half.at(9) == full.optimizer / 2


class TestDepth:
    @pytest.mark.parametrize("number", range(4))
    def test_of_few_blocks_tells_what_a_track_of_all_finds(self, number):
        layout, recompute = layouts(4, 2)[number], CHECKPOINTING[number % 3]
        step = Step(layout, DEEP, rank=8, length=16, sequences=3, recompute=recompute)
        found, expected = track_at_depth(step, processes=4), track(step, processes=4)
        assert len(expected.parts) == 1 + 2 * DEEP.layers + 1
        assert (found.weights, found.optimizer) == (expected.weights, expected.optimizer)
        assert found.totals.max() == expected.peak

    @pytest.mark.parametrize("layout", layouts(4, 2), ids=lambda layout: layout.name)
    def test_of_few_blocks_tells_what_is_sent_for_all(self, layout):
        step = Step(layout, DEEP, rank=8, length=16)
        with pretended(4):
            assert sent_at_depth(step, sent_in_step) == sent_in_step(step)
            if layout.low_rank:
                found = sent_at_depth(step, sent_in_restart)
                assert found == sent_in_restart(step)


@pytest.fixture
def of_bytes(monkeypatch):
    """Return what lets every peak be so many bytes, tracked nowhere."""

    class Here:
        map = staticmethod(map)

    def put(peak: float) -> None:
        def known(step, *, processes, moments):
            return Peak(step, 1.0, 1.0, np.array([peak]), np.array([1.0]))

        monkeypatch.setattr(rows_of_layouts, "estimate_peak", known)
        monkeypatch.setattr(command, "ProcessPoolExecutor", lambda *_, **__: nullcontext(Here))

    return put


class TestCommand:
    @pytest.mark.slow
    def test_gives_a_table_and_options_that_fit(self, tmp_path, capsys):
        out = tmp_path / "estimate.jsonl"
        assert main([*SMALL, "--out", str(out), "--sequences", "24"]) == 0
        said = capsys.readouterr().out
        first, *rows = map(json.loads, out.read_text().splitlines())
        assert first["event"] == "estimate"
        assert [(r["phase"], r["recompute"]) for r in rows] == [
            (phase, recompute)
            for phase in (
                "warm start",
                "ReLoRA, shard",
                "ReLoRA, replicate",
                "ReLoRA, replicate, base bf16",
            )
            for recompute in CHECKPOINTING
        ]
        for row in rows:
            assert row["micro"] == 12  # of a process: all of them fit
            assert 0 < row["weights"] + row["optimizer"] < row["peak"] < 0.9 * GPUS["h100"][0]
            assert row["seconds"][0] <= row["seconds"][1]
        kept, selective, recomputed = rows[:3]
        assert recomputed["peak"] < selective["peak"] < kept["peak"]
        assert kept["seconds"][1] < selective["seconds"][1] < recomputed["seconds"][1]
        assert "--batch.micro 12 --parallel.layout" in said
        assert f"| {kept['peak'] / GiB:.2f} GiB | 12 (of {kept['fits']} that fit) |" in said

    def test_of_one_gpu_sends_nothing(self, tmp_path, monkeypatch, of_bytes):
        monkeypatch.setattr(command, "CHECKPOINTING", ("none",))
        of_bytes(1.0)
        out = tmp_path / "estimate.jsonl"
        assert main([*SMALL, "--world-size", "1", "--out", str(out)]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()][1:]
        assert all(row["sent"] == 0 and row["seconds"][0] == row["seconds"][1] for row in rows)

    @pytest.mark.slow
    def test_reduces_in_every_micro_step_where_nothing_fits_otherwise(self, monkeypatch, capsys):
        room = GPUS["h100"][0] * (1 - command.KEPT_FREE)

        def known(step, *, processes, moments):
            whole = step.accumulates and step.reduce == "step"
            each = np.array([0.3 * room])
            return Peak(step, 1.0, 1.0, np.array([1.1 * room if whole else 1.0]), each)

        monkeypatch.setattr(command, "CHECKPOINTING", ("none",))
        monkeypatch.setattr(rows_of_layouts, "estimate_peak", known)
        monkeypatch.setattr(
            command, "ProcessPoolExecutor", lambda *_, **__: nullcontext(SimpleNamespace(map=map))
        )
        assert main([*SMALL, "--world-size", "2", "--sequences", "24"]) == 0
        said = capsys.readouterr().out
        assert "--batch.micro 3 --parallel.layout" in said
        assert "--parallel.reduce micro-step" in said

    def test_says_so_if_nothing_fits(self, capsys, of_bytes):
        of_bytes(GPUS["h100"][0])  # a tenth of which is kept free
        assert main(SMALL) == 0
        said = capsys.readouterr().out
        assert "It does not fit:" in said
        assert said.count("none fits") == 12

    def test_takes_the_layout_that_is_fastest(self):
        row = rows_of_layouts.Row(
            *("warm start", "shard", "keep", "none", 1, 1, 9, 4, 4, "step", 1.0, (2.0, 3.0)),
            peaks=(3 * GiB, 6 * GiB, 8 * GiB, 9 * GiB),
        )
        slow = dataclasses.replace(row, phase="ReLoRA, shard", seconds=(1.9, 2.9))
        fast = dataclasses.replace(
            row, phase="ReLoRA, replicate", layout="replicate", seconds=(1.0, 1.5), micro=2
        )
        fast = dataclasses.replace(fast, peaks=(2 * GiB, 4 * GiB))
        again = dataclasses.replace(fast, recompute="full", seconds=(0.1, 0.1))  # of no warm start
        first, second = command.advice([row, slow, fast, again], 10.0)
        assert "--batch.micro 2 --parallel.layout replicate" in first
        assert (
            "takes 0.50 of the time of a step of the warm start (with 2 sequences at once; 4"
            in second
        )
        assert "2.0 GiB less" in second  # both with two at once

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--world-size", "0"], "--world-size must be 1 or more; got 0"),
            (
                ["--world-size", "12"],
                "--world-size must be a multiple of 8, the GPUs on a node; got 12",
            ),
            (["--sequences", "3"], "--sequences must be a multiple of --world-size 2; got 3"),
            (["--rank", "999"], "--rank must be at most 128"),
            (["--length", "0"], "--length must be 1 or more; got 0"),
            (["--out", "."], ". exists already"),
        ],
    )
    def test_refuses(self, capsys, given, message):
        assert main([*SMALL, *given]) == 2
        (error,) = lines_of(capsys.readouterr().err)
        assert message in error

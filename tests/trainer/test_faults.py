"""After a fault, a run skips the step, or saves, or stops, on all processes alike."""

import errno
import gc
import math
import os
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch

from reference_trainer import export as exporting
from reference_trainer import train as training
from reference_trainer.checkpoint import save as saving
from reference_trainer.checkpoint.find import complete_checkpoints, newest_sound
from reference_trainer.logging.progress import is_spike
from reference_trainer.main import main
from tests.trainer.runs import RUN, losses, records, start, train

BATCH = training.forward_backward


@pytest.fixture
def fail_at(monkeypatch):
    """Return a function that makes the losses and gradients of given steps not finite."""

    def arrange(steps, value=float("nan")):
        seen = []

        def spoilt(model, batch, *others):
            loss = BATCH(model, batch, *others)
            if len(seen) in steps:
                parameter = next(p for p in model.parameters() if p.grad is not None)
                parameter.grad.to_local()[0] = value
            seen.append(None)
            return loss

        monkeypatch.setattr(training, "forward_backward", spoilt)

    return arrange


class TestNonFinite:
    @pytest.mark.parametrize("step", [0, 5, 11, 13], ids=["first", "warm", "at a restart", "late"])
    def test_a_step_is_skipped_and_leaves_no_trace(self, tiny, fail_at, monkeypatch, step):
        """As if the optimizer alone had not been called: everything else goes on."""
        for value in ("nan", "inf"):
            fail_at({step}, float(value))
            train(*tiny, "--name", value)

        monkeypatch.setattr(training, "forward_backward", BATCH)
        calls = []

        def without_one(self, *_):
            calls.append(None)
            return None if len(calls) == step + 1 else kept(self)

        kept = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", without_one)
        train(*tiny, "--name", "without")
        other = Path("runs/without")
        files = "export/model.safetensors"
        for value in ("nan", "inf"):
            one = Path("runs", value)
            assert (one / files).read_bytes() == (other / files).read_bytes()
            (record,) = records(one, "skipped")
            assert record["step"] == step
            assert record["gradient_norm"] == value
            skipping, complete = losses(one), losses(other)
            assert skipping == {k: v for k, v in complete.items() if k != step}
            assert len(records(one, "restart")) == 2

    def test_a_record_of_several_steps_is_of_those_not_skipped(self, tiny, fail_at):
        fail_at({3})
        train(*tiny, "--log.every", "2")
        (record,) = (r for r in records(RUN, "step") if r["step"] == 3)
        assert math.isfinite(record["loss"])
        assert math.isfinite(record["gradient_norm"])

    def test_too_many_in_a_row_end_the_run_with_the_weights_from_before(
        self, tiny, fail_at, capsys
    ):
        fail_at({3, *range(8, 14)})
        assert main(["train", *tiny, "--optim.most_skips", "4"]) == 2
        error = capsys.readouterr().err
        assert "4 steps in a row, to step 11, had a non-finite loss or gradient" in error
        newest, _ = newest_sound(RUN / "checkpoints")
        assert f"{newest} has the weights from before them" in error
        assert newest.name == "step-00000012"
        assert [r["step"] for r in records(RUN, "skipped")] == [3, 8, 9, 10, 11]
        train("--resume")  # the fault is gone: it goes on
        assert max(losses(RUN)) == 19

    def test_a_restart_that_refuses_ends_the_run(self, tiny, monkeypatch, capsys):
        def refuse(*_, **__):
            raise ValueError("the update of 3 sites is not finite")

        monkeypatch.setattr(training, "restart_", refuse)
        assert main(["train", *tiny]) == 2
        error = capsys.readouterr().err
        assert "the restart at step 11 was refused: the update of 3 sites" in error


class TestSpikes:
    def test_a_jump_is_recorded(self, tiny, monkeypatch):
        def jumping(model, batch, *others):
            loss = BATCH(model, batch, *others)
            calls.append(None)
            return loss + (5 if len(calls) == 19 else 0)

        calls = []
        monkeypatch.setattr(training, "forward_backward", jumping)
        train(*tiny, "--relora.warm_start", "0")
        assert [r["step"] for r in records(RUN, "spike")] == [18]

    def test_noise_is_none(self):
        torch.manual_seed(0)
        noise = (2 + 0.1 * torch.randn(1000)).tolist()
        found = [is_spike(mean, noise[i : i + 20]) for i, mean in enumerate(noise[20:])]
        assert sum(found) <= 5
        assert not is_spike(9.0, noise[:9])


class TestStops:
    def stop(self, process, run, number, at):
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and f'"step": {at},' in metrics.read_text():
                break
            time.sleep(0.002)
        process.send_signal(number)

    def test_sigterm_saves_and_stops_and_the_run_goes_on_to_the_same_bits(self, tiny, tmp_path):
        train(*tiny, "--name", "whole")
        process = start([*tiny, "--name", "stopped", "--checkpoint.every", "1000"], cwd=tmp_path)
        run = Path("runs/stopped")
        self.stop(process, run, signal.SIGTERM, 8)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == os.EX_TEMPFAIL, output
        newest = complete_checkpoints(run / "checkpoints")[-1]
        assert newest.name > "step-00000006"  # not only the hand-off
        assert f"continues from {newest}: python -m reference_trainer train --resume" in output
        assert not (run / "export").exists()
        train("--resume", "--name", "stopped")
        weights = "export/model.safetensors"
        assert (run / weights).read_bytes() == Path("runs/whole", weights).read_bytes()
        assert losses(run) == losses(Path("runs/whole"))

    def test_sigusr1_saves_and_goes_on(self, tiny, tmp_path):
        never = ("--checkpoint.every", "1000", "--checkpoint.keep", "9")
        process = start([*tiny, "--name", "asked", *never], cwd=tmp_path)
        run = Path("runs/asked")
        self.stop(process, run, signal.SIGUSR1, 8)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        saved = [found.name for found in complete_checkpoints(run / "checkpoints")]
        assert len(saved) == 3
        assert saved[0] == "step-00000006"
        assert saved[2] == "step-00000020"

    def test_its_time_over_it_saves_and_stops(self, tiny, capsys):
        assert main(["train", *tiny, "--checkpoint.stop_after", "1e-9"]) == os.EX_TEMPFAIL
        assert "stopped before step 1: runs/first-run continues from" in capsys.readouterr().err
        train("--resume", "--checkpoint.stop_after", "60")
        assert sorted(losses(RUN)) == list(range(20))

    def test_the_handlers_from_before_are_put_back(self, tiny):
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
        train(*tiny)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_a_checkpoint_that_cannot_be_removed_stays_until_it_can(tiny, monkeypatch, capsys):
    """As one that another program reads, over a network."""
    remove, tried = saving._remove, []

    def busy(old: Path) -> None:
        tried.append(old.name)
        if tried.count("step-00000004") == 1 and old.name == "step-00000004":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(old))
        remove(old)

    monkeypatch.setattr(saving, "_remove", busy)
    train(*tiny)
    assert "step-00000004 could not be removed yet" in capsys.readouterr().err
    assert tried.count("step-00000004") == 2
    kept = sorted(path.name for path in (RUN / "checkpoints").iterdir())
    assert kept == ["step-00000016", "step-00000020"]


def test_what_is_over_leaves_no_model_in_memory(tiny, monkeypatch):
    build, models = training.build_state, []

    def watched(*arguments, **options):
        assert [model() for model in models] == [None] * len(models)
        state = build(*arguments, **options)
        models.append(weakref.ref(state.model))
        return state

    monkeypatch.setattr(training, "build_state", watched)
    gc.disable()  # which may run at any time, or too late
    try:
        train(*tiny)
    finally:
        gc.enable()
    assert len(models) == 2  # of both phases; the export takes the last one's weights


def test_an_export_that_cannot_be_written_is_said_by_all(tiny, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting.relora, "save_merged", full)
    assert main(["train", *tiny]) == 2
    said = "could not write runs/first-run/export: [Errno 28] No space left on device"
    assert said in capsys.readouterr().err


def test_checkpoints_at_multiples_stay(tiny):
    train(*tiny, "--checkpoint.every", "2", "--checkpoint.keep_every", "8")
    assert [c.name[-2:] for c in complete_checkpoints(RUN / "checkpoints")] == [
        *("08", "16", "18", "20")
    ]

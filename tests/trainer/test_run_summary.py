"""A dry run says what the run then does, and does nothing."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from reference_trainer import options
from reference_trainer.bench.layouts import LAYOUTS, Step, laid_out, pretended, world_of
from reference_trainer.checkpoint.find import complete_checkpoints
from reference_trainer.main import main
from reference_trainer.phases import phases
from reference_trainer.preflight import count
from reference_trainer.run_summary import memory
from tests.trainer.runs import RUN, records, train

GIVEN = {"relora.rank": 4, "relora.warm_start": 4, "relora.every": 5, "relora.warmup": 2}


def planned(capsys, *arguments):
    """Return what a dry run prints, by the name that stands before it."""
    capsys.readouterr()
    assert main(["train", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Nothing has been written."
    found, name = {}, ""
    for line in lines[:-1]:
        name = line[:12].strip() or name
        found.setdefault(name, []).append(line[12:])
    return {name: " ".join(texts) for name, texts in found.items()}


def test_what_is_said_is_what_is_done(tiny, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    said = planned(capsys, *tiny, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    train(*tiny)
    exported = load_file(RUN / "export/model.safetensors")
    assert f" {sum(t.numel() for t in exported.values()):,} parameters" in said["model"]
    restarts = records(RUN, "restart")
    steps = ", ".join(str(r["step"]) for r in restarts)
    assert said["restarts"].startswith(f"{len(restarts)}, before steps {steps} ")
    assert f"into {restarts[0]['sites']} matrices" in said["restarts"]
    ranks = records(RUN, "end")[-1]["ranks"].values()
    assert f"a rank of up to {max(ranks)} at the end" in said["restarts"]
    rates = [r["lr_adapters"] for r in records(RUN, "step") if "lr_adapters" in r]
    assert max(rates) <= float(re.search(r"factors ([\d.e-]+)", said["rate"])[1])
    assert "20 steps are 2,560 tokens" in said["batch"]
    assert "2 times 2 at once" in said["batch"]
    newest = complete_checkpoints(RUN / "checkpoints")[-1]
    size = sum(file.stat().st_size for file in newest.iterdir())
    promised = float(re.search(r"then ([\d.]+) MB", said["files"])[1])
    assert size / 1e6 == pytest.approx(promised, rel=0.3)
    for file in RUN.iterdir():
        assert file.name in said["files"]


def test_a_run_that_is_there_is_gone_on_with(finished, capsys):
    written = {file: file.stat().st_mtime_ns for file in Path().rglob("*")}
    said = planned(capsys, "--resume", "--dry-run")
    assert "from its newest complete checkpoint on" in said["files"]
    assert re.search(
        r"runs/first-run/data: tokens [\d,]+ of train, [\d,]+ of held_out", said["data"]
    )
    assert {file: file.stat().st_mtime_ns for file in Path().rglob("*")} == written
    assert main(["train", "--resume", "--dry-run", "--optim.lr", "5"]) == 2
    assert "was begun with a different optim.lr" in capsys.readouterr().err
    assert main(["train", *finished, "--dry-run"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_it_needs_no_gpu_to_say_what_a_run_on_gpus_would_do(tiny, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = [*tiny, "--model.hidden_size", "1024", "--model.intermediate_size", "2048"]
    given += ["--dry-run", "2", "--parallel.layout", "shard", "--parallel.device"]
    there = planned(capsys, *given, "cuda")
    assert there == planned(capsys, *given, "cpu", "--parallel.precision", "bf16")
    assert there != planned(capsys, *given, "cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure-bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_memory_is_that_of_what_is_built(layout, precision):
    given = {
        **GIVEN,
        "steps": 20,
        "parallel.device": "cpu",
        "parallel.precision": precision,
        "parallel.layout": layout.bases,
        "model.preset": "1m",
    }
    if not layout.low_rank:
        given["relora.warm_start"] = 20
    if precision != "fp32":
        given["relora.base"] = layout.base
    config = options.resolve(None, given)
    shape = config.model.shape(256)
    (phase,) = phases(config)[-1:]
    numbers = count(config, shape, phase)
    with pretended(4):
        state = laid_out(Step(layout, shape, 4, 16, precision=precision), world_of(layout))
        held = [getattr(p, "_local_tensor", p) for p in state.model.parameters()]
        trained = [getattr(p, "_local_tensor", p) for p in state.parameters.values()]
        built = sum(p.nbytes for p in held) + 3 * sum(p.nbytes for p in trained)
    assert memory(config, numbers, 4) == pytest.approx(built, rel=0.01)
    assert numbers.trained == sum(p.numel() for p in state.parameters.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dry-run", "0"], "1 process or more; got 0"),
        (["--dry-run", "3"], "must be a multiple of the number of processes"),
        (["--dry-run", "--relora.rank", "33"], "rank must be between"),
        (["--dry-run", "--data.files", "none"], "no file matches"),
    ],
)
def test_what_the_run_would_refuse_is_refused(tiny, tmp_path, capsys, given, message):
    assert main(["train", *tiny, *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

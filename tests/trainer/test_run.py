"""A whole run: phases, restarts, resume after a kill, export, the same on two processes."""

import glob
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference_trainer.checkpoint import save as saving
from reference_trainer.checkpoint.find import complete_checkpoints
from reference_trainer.data.index import read_index
from reference_trainer.data.windows import open_windows
from reference_trainer.files import locked
from reference_trainer.logging.metrics import read
from reference_trainer.main import main
from reference_trainer.model.llama import Llama
from tests.trainer.runs import (
    EVERY_CHECKPOINT,
    RUN,
    SOURCES,
    TINY,
    lines_of,
    losses,
    records,
    rewound,
    start,
    state_at,
    train,
)

EXPORTING = Path(__file__).parents[2] / "docs/how-to/export.md"


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def test_a_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(*TINY)
    out = capsys.readouterr().out
    assert "model:   runs/first-run/export" in out
    assert "restarts: 2, each merging 14 matrices" in out
    assert "rank of the accumulated update: 12 to 12 after 3 cycles of rank 4 (bound 12)" in out
    assert {p.name for p in RUN.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "data", "checkpoints", "export"),
        *("report.html", "report.png"),
    }
    assert (RUN / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (RUN / "export").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert (RUN / "export/model.safetensors").stat().st_mode == (RUN / "config.yaml").stat().st_mode
    assert [p.name for p in complete_checkpoints(RUN / "checkpoints")] == [
        "step-00000016",
        "step-00000020",
    ]
    assert sorted(losses(RUN)) == list(range(20))
    assert not [name for name in load_file(RUN / "export/model.safetensors") if "lora" in name]


def test_restarts_come_on_their_clock_and_the_rate_is_zero_there(finished):
    restarts = records(RUN, "restart")
    assert [(r["step"], r["restart"], r["sites"]) for r in restarts] == [(11, 1, 14), (16, 2, 14)]
    assert all(0.98 < r["zeroed_fraction"] < 1 for r in restarts)
    for record in restarts:
        assert set(record["ranks"].values()) == {4 * record["restart"]}
    rates = {r["step"]: r for r in records(RUN, "step")}
    for step in (11, 16):
        assert rates[step]["lr_adapters"] == rates[step]["lr_matrices"] == 0.0
    for step in (8, 14, 19):  # past every warm-up
        assert rates[step]["lr_adapters"] == pytest.approx(4 * rates[step]["lr_matrices"])
    assert "lr_adapters" not in rates[5]


def test_the_loss_falls(tiny):
    train(*tiny, "--optim.lr", "1e-2")
    found = records(RUN, "evaluation")
    assert [r["step"] for r in found] == [0, 6, 6, 7, 14, 20]
    assert found[1]["held_out_loss"] == found[2]["held_out_loss"]  # the hand-off keeps the function
    assert found[-1]["held_out_loss"] < found[1]["held_out_loss"] < found[0]["held_out_loss"]


def test_what_stays_trainable_keeps_its_optimizer_state_across_the_hand_off(tiny):
    train(*tiny, "--steps", "6")  # the warm start alone
    before, after = ({}, {})
    for name, into in (("warm-start", before), ("relora", after)):
        file = (RUN / "config.yaml").read_text()
        (RUN / "config.yaml").write_text(file.replace("steps: 6", "steps: 20"))
        for state, _ in state_at(name):
            for parameter_name, p in state.parameters.items():
                moments = state.optimizer.state.get(p, {})
                into[parameter_name] = {
                    k: getattr(v, "full_tensor", lambda v=v: v)().clone()
                    for k, v in moments.items()
                }
    carried = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert carried < set(after)
    for name, state in after.items():
        if "lora_" in name:
            assert state == {}
        else:
            assert state.keys() == before[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(state[key], before[name][key]) for key in state)
            assert float(state["step"]) == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure-bf16"])
def test_a_restart_keeps_the_trained_model_s_function(tiny, precision):
    import relora_core as relora
    from tests.reference import ulp

    train(*tiny, "--parallel.precision", precision, "--optim.lr", "1e-2")
    for state, config in state_at("relora"):  # the last cycle is not merged yet
        assert all(
            site.lora_B.full_tensor().any() for _, site in relora.low_rank_sites(state.model)
        )
        windows = open_windows(
            RUN / "data", read_index(RUN / "data"), "held_out", config.batch.length
        )
        tokens = windows.read(torch.arange(8).numpy())[:, :-1]
        with torch.no_grad():
            before = state.model(tokens)
            relora.restart_(state.model, state.optimizer)
            after = state.model(tokens)
        assert before.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        # Which outputs round to another side depends on the text; without the merge it is 11.
        apart = (after - before).abs().max() / ulp(before.abs().max())
        assert apart <= (0 if precision == "fp32" else 4)


def test_the_export_is_transformers_llama_with_the_same_logits(finished, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer, LlamaForCausalLM

        theirs = LlamaForCausalLM.from_pretrained(RUN / "export").eval()
        tokenizer = AutoTokenizer.from_pretrained(RUN / "export")
    text = "def é(\n\t x):  ☃"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    (block,) = re.findall(r"^```py\n(.*?)^```", EXPORTING.read_text(), re.DOTALL | re.MULTILINE)
    capsys.readouterr()
    exec(block, {})  # docs/how-to/export.md
    assert capsys.readouterr().out.startswith("def __init__(self")
    for state, config in state_at("relora"):
        windows = open_windows(
            RUN / "data", read_index(RUN / "data"), "held_out", config.batch.length
        )
        tokens = windows.read(torch.arange(4).numpy())[:, :-1]
        with torch.no_grad():
            assert (theirs(tokens).logits - state.model(tokens)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "options",
    [
        ("--parallel.checkpoint_activations", "selective"),
        ("--parallel.checkpoint_activations", "full"),
        ("--batch.micro", "4"),
        ("--data.prepared", f"{RUN}/data", "--data.files"),
    ],
    ids=lambda options: " ".join(options[:2]),
)
def test_how_it_is_computed_does_not_change_what_is_computed(finished, options):
    train(*finished, "--name", "other", *options)
    assert losses(Path("runs/other")) == pytest.approx(losses(RUN), abs=1e-5)


@pytest.mark.parametrize(("sequences", "at_once"), [(4, 2), (2, 2), (1, 1)])
def test_an_evaluation_computes_as_many_sequences_at_once_as_a_step(
    tiny, monkeypatch, sequences, at_once
):
    seen, forward = set(), Llama.forward

    def watched(self, tokens, *targets):
        seen.add(len(tokens))
        return forward(self, tokens, *targets)

    monkeypatch.setattr(Llama, "forward", watched)
    train(*tiny, "--batch.sequences", str(sequences), "--steps", "6")
    assert seen == {at_once}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look
def test_compiled_blocks_compute_the_same(finished):
    train(*finished, "--name", "other", "--parallel.compile", "true")
    assert losses(Path("runs/other")) == pytest.approx(losses(RUN), abs=1e-4)


def test_a_checkpoint_that_the_run_waits_for_is_not_copied(tiny, monkeypatch):
    monkeypatch.setattr("reference_trainer.checkpoint.save._on_host", None)
    train(*tiny, "--checkpoint.every", "1000")
    assert [p.name for p in complete_checkpoints(RUN / "checkpoints")] == [
        "step-00000006",
        "step-00000020",
    ]
    with pytest.raises(TypeError):  # one that it does not wait for is
        train(*tiny, "--name", "other")


def test_resuming_a_finished_run_changes_nothing(tiny, capsys):
    train(*tiny)
    before = (RUN / "export/model.safetensors").read_bytes()
    said, kept = capsys.readouterr().out, read(RUN / "metrics.jsonl")
    train("--resume")
    assert (RUN / "export/model.safetensors").read_bytes() == before
    assert [r for r in read(RUN / "metrics.jsonl") if r["event"] != "start"] == kept[1:]
    out = capsys.readouterr().out
    assert out.endswith(said[said.index("\nheld-out") :])
    assert f"from step 20, from {RUN}/checkpoints/step-00000020\n" in out


@pytest.mark.parametrize("at", [6, 14])
def test_a_record_at_the_step_of_a_checkpoint_is_kept_once(tiny, at):
    """A run stopped right after that checkpoint, at the hand-off and elsewhere."""
    train(*tiny, "--log.evaluate_every", "7", "--checkpoint.every", "7", "--checkpoint.keep", "9")
    whole = [r for r in read(RUN / "metrics.jsonl") if r["event"] != "start"]
    for later in complete_checkpoints(RUN / "checkpoints"):
        if later.name > f"step-{at:08d}":
            shutil.rmtree(later)
    train("--resume")
    again = [r for r in read(RUN / "metrics.jsonl") if r["event"] != "start"]
    untimed = ("tokens_per_second", "seconds", "peak_memory")
    for records_ in (whole, again):
        for record in records_:
            for key in untimed:
                record.pop(key, None)
    assert again == whole


def test_a_renamed_run_without_its_sources_resumes_where_it_lies(tiny, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for path in glob.glob(SOURCES):
        shutil.copy(path, tmp_path / "text")
    train(*tiny, "--data.files", "text/*.py", "--name", "old")
    shutil.rmtree(tmp_path / "text")
    Path("runs/old").rename("runs/new")
    train("--resume", "--name", "new")
    assert "model:   runs/new/export" in capsys.readouterr().out
    assert not Path("runs/old").exists()


def test_a_run_in_use_is_refused(finished, capsys):
    with locked(RUN / "config.yaml"):
        assert main(["train", "--resume"]) == 2
    assert "is in use by a run in progress" in capsys.readouterr().err


def test_a_refused_run_leaves_its_neighbours(tiny, tmp_path, monkeypatch, capsys):
    """Another run that began in the same new directory meanwhile must survive."""

    def fail(*_):
        (tmp_path / "runs" / "neighbour").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("reference_trainer.run_directory.prepare", fail)
    assert main(["train", *tiny]) == 130
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["neighbour"]


def test_resuming_with_another_configuration_is_refused(finished, capsys):
    assert main(["train", "--resume", "--relora.rank", "2", "--seed", "5"]) == 2
    assert "begun with a different seed, relora.rank" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--seed", "5"), ("--data.held_out", "0.3")])
def test_a_checkpoint_of_another_run_is_refused(finished, capsys, option):
    train(*finished, *option, "--name", "other")
    shutil.rmtree(RUN / "checkpoints")
    shutil.copytree("runs/other/checkpoints", RUN / "checkpoints")
    before = (RUN / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume"]) == 2
    (error,) = lines_of(capsys.readouterr().err)
    assert f"begun with a different {option[0].removeprefix('--')}" in error.replace(
        "data.checksums, ", ""
    )
    assert (RUN / "metrics.jsonl").read_bytes() == before


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_by_name_and_the_run_ends_the_same(tiny, capsys):
    train(*tiny, *EVERY_CHECKPOINT, "--name", "whole")
    again = rewound("whole", 16)
    *_, older, newest = complete_checkpoints(again / "checkpoints")
    shard = next(newest.glob("*.safetensors"))
    damage(shard)
    capsys.readouterr()
    train("--resume", "--name", again.name)
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warned == [
        f"warning: {shard} is damaged (its checksum differs): continuing from {older.name}"
    ]
    exports = [run / "export/model.safetensors" for run in (again, Path("runs/whole"))]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    assert losses(again) == losses(Path("runs/whole"))


def test_a_damaged_checkpoint_is_none_of_those_that_are_kept(finished, monkeypatch):
    remove, removed = saving._remove, []

    def watched(old):
        removed.append(int(old.name[-2:]))
        remove(old)

    monkeypatch.setattr(saving, "_remove", watched)
    damage(next((RUN / "checkpoints/step-00000020").glob("*.safetensors")))
    train("--resume", "--checkpoint.every", "1")  # from 16, and 2 are kept
    assert removed == [16, 17, 20, 18]


def test_only_damaged_checkpoints_are_refused_by_name(finished, capsys):
    found = complete_checkpoints(RUN / "checkpoints")
    shards = [next(one.glob("*.safetensors")) for one in found]
    for shard in shards:
        damage(shard)
    for command in (["train", "--resume"], ["export", str(RUN)]):
        assert main(command) == 2
        (error,) = lines_of(capsys.readouterr().err)
        assert all(f"{shard} is damaged" in error for shard in shards)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 3, "checksums": {}}', "[" * 100_000, "\udcff"]
)
def test_a_damaged_manifest_is_passed_over_by_name(finished, capsys, text):
    older, newest = complete_checkpoints(RUN / "checkpoints")
    (newest / "manifest.json").write_text(text, errors="surrogateescape")
    capsys.readouterr()
    assert main(["export", str(RUN)]) == 0
    error = capsys.readouterr().err
    assert f"warning: {newest.resolve()}/manifest.json is damaged" in error
    assert f"continuing from {older.name}" in error


def test_two_processes_compute_what_one_does(tiny, tmp_path):
    """20 steps with the hand-off and two restarts, fp32."""
    arguments = [*tiny, "--log.rank_sites", "3"]
    train(*arguments, "--name", "one")
    finish(start([*arguments, "--name", "two"], processes=2, cwd=tmp_path))
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert len(records(two, "restart")) == 2
    for a, b in zip(records(one, "evaluation"), records(two, "evaluation"), strict=True):
        assert a["held_out_loss"] == pytest.approx(b["held_out_loss"], abs=1e-4)
    first, second = (load_file(d / "export/model.safetensors") for d in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)

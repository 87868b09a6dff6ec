"""Bad input gives one clear line and exit code 2, and leaves nothing behind."""

import re

import pytest

from reference_trainer.__main__ import main
from tests.trainer.conftest import SOURCES


def _empty_file(directory):
    (directory / "empty.txt").touch()
    return ["--data.files", "empty.txt"]


def _few_tokens(directory):
    for n in range(40):
        (directory / f"{n}.txt").write_text(f"{n}")
    return ["--data.files", "[0-9]*.txt", "--data.held_out", "0.3"]


def _config(text):
    def write(directory):
        (directory / "run.yaml").write_text(text)
        return ["--config", "run.yaml"]

    return write


BAD = {
    "unknown option": (["--relora.rnk", "4"], "unknown option --relora.rnk: the nearest is relora"),
    "unknown key in a file": (_config("relora: {rnk: 4}"), "unknown option relora.rnk"),
    "a word for a number": (["--steps", "many"], "steps: .*valid integer"),
    "missing data": (["--data.files", "none/*.txt"], "no file matches 'none/"),
    "empty data": (_empty_file, "all 1 files are empty"),
    "too few tokens": (_few_tokens, "less than one window"),
    "missing prepared data": (["--data.files", "--data.prepared", "no"], "no index.json"),
    "rank above a dimension": (["--relora.rank", "33"], r"rank must be between 1 and .* got 33"),
    "a target that matches nothing": (["--relora.targets", "*.attention.*"], "matches no module"),
    "a period as long as its warm-up": (
        ["--relora.every", "10", "--relora.warmup", "10"],
        "relora.every must be longer than relora.warmup",
    ),
    "heads that do not divide": (["--model.heads", "5", "--model.kv_heads", "5"], "multiple of"),
    "a device that is not there": (["--parallel.device", "tpu"], "'auto', 'cpu' or 'cuda'"),
    "nothing to resume": (["--resume"], "holds no run to resume"),
    "a directory as data": (["--data.files", "."], "is a directory: name its files"),
    "a file as the directory of runs": (["--runs", __file__], "File exists"),
    "a missing configuration": (["--config", "no.yaml"], "cannot read no.yaml"),
}


def lines_of(text):
    """Return the lines of standard error; gloo of torch 2.8 writes there that it has connected."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_train_command(tiny, tmp_path, capsys, case):
    given, message = BAD[case]
    arguments = given(tmp_path) if callable(given) else given
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *tiny, *arguments]) == 2
    error = lines_of(capsys.readouterr().err)
    assert len(error) == 1
    assert re.match(f"error: .*{message}", error[0]), error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_world_size_that_does_not_divide_the_batch(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", *tiny]) == 2
    assert "multiple of the number of processes; got sequences=4, processes=3" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_directory_that_holds_another_run(tiny, tmp_path, capsys):
    directory = tmp_path / "runs" / "first-run"
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("precious\n")
    assert main(["train", *tiny]) == 2
    error = capsys.readouterr().err
    assert "holds a run already: --resume it, remove it, or give another --name" in error
    assert [p.name for p in directory.iterdir()] == ["metrics.jsonl"]
    assert (directory / "metrics.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["report", "none"], "none holds no metrics.jsonl"),
        (["export", "none"], "none holds no run"),
        (["prepare", "."], "exists already"),
        (["prepare", "out", "--data.prepared", "x"], "give data.files instead"),
        (["prepare", "out", "--data.files", "none.txt"], "no file matches"),
        (["report", "none", "--out", "no/x.png"], "none holds no metrics.jsonl"),
    ],
)
def test_a_wrong_command(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["train"], ["prepare"], ["export"], ["report"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m reference_trainer" in text
    if command in ([], ["train"]):
        assert "torchrun --nproc-per-node 8" in text
    if command == ["train"]:
        assert "--relora.rank RANK" in text


def test_prepare_is_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["prepare", str(tmp_path / "out"), "--data.files", SOURCES]) == 2
    assert "runs as one process" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("reference_trainer.__main__.train", interrupted)
    assert main(["train", *tiny]) == 130
    assert "`train --resume` goes on" in capsys.readouterr().err


def test_prepared_data_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "tokens", "--data.files", SOURCES, "--data.held_out", "0.2"]) == 0
    assert "--data.prepared tokens" in capsys.readouterr().out
    assert (tmp_path / "tokens" / "index.json").is_file()

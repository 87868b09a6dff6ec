"""Bad input gives one clear line and exit code 2, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reference_trainer.main import _BENCHMARKS, _COMMANDS, main
from reference_trainer.options import write
from tests.trainer.runs import SOURCES, lines_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


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
    "unknown option": (["--relora.rnk", "4"], "--relora.rnk: the nearest is --relora.rank "),
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
        "relora.warmup must be at least 1 and below relora.every",
    ),
    "heads that do not divide": (["--model.heads", "5", "--model.kv_heads", "5"], "multiple of"),
    "a device that is not there": (["--parallel.device", "tpu"], "'auto', 'cpu' or 'cuda'"),
    "nothing to resume": (["--resume"], "holds no run to resume"),
    "a directory as data": (["--data.files", "."], "is a directory: name its files"),
    "a file as the directory of runs": (["--runs", __file__], "File exists"),
    "a missing configuration": (["--config", "no.yaml"], "cannot read no.yaml"),
}


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
        (["--quiet", "train"], "--quiet must come after a command: give one of train, prepare"),
        (
            ["bench", "--level", "block"],
            "--level must come after a command: give one of step, rest",
        ),
        (["bench"], "required: COMMAND"),
        (["bench", "block"], "invalid choice: 'block'"),
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


PATHS = [[name] for name in _COMMANDS] + [["bench", name] for name in _BENCHMARKS]


@pytest.mark.parametrize("command", [[], *PATHS])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: {' '.join(['python -m reference_trainer', *command])} [" in text
    assert "examples:\n  python -m reference_trainer " in text or command == ["bench"]
    if command in ([], ["train"]):
        assert "torchrun --nproc-per-node 8" in text
    if command == ["train"]:
        assert "--relora.rank RANK" in text


def ran(code):
    """Return what a Python of its own has made of `code`."""
    arguments = [sys.executable, "-c", code]
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def begun(arguments, cwd):
    """Begin a Python whose errors are read, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def test_what_commands_there_are_is_said_before_torch_is_imported():
    ask = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    ask += "from reference_trainer.main import main; main(['--help'])"
    done = ran(ask)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in _COMMANDS)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_crash_in_native_code_says_where():
    crash = "import ctypes, runpy, reference_trainer.main as module; "
    crash += "module.main = lambda: ctypes.string_at(0); "
    crash += "runpy.run_module('reference_trainer', run_name='__main__')"
    done = ran(crash)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "__main__.py" in done.stderr


def test_prepare_is_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["prepare", str(tmp_path / "out"), "--data.files", SOURCES]) == 2
    assert "runs as one process" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    def interrupted(config, **_):
        if config.name == "cut":
            config.directory.mkdir(parents=True)
            write(config, config.directory / "config.yaml")
        raise KeyboardInterrupt

    monkeypatch.setattr("reference_trainer.commands.train.train", interrupted)
    assert main(["train", *tiny, "--name", "early"]) == 130
    assert "runs/early had not begun: start it again\ninterrupted\n" in capsys.readouterr().err
    assert main(["train", *tiny, "--name", "cut"]) == 130
    told = "runs/cut continues from its beginning, as it has no checkpoint yet: "
    command = "python -m reference_trainer train --resume --name cut"
    assert f"{told}{command}\ninterrupted\n" in capsys.readouterr().err


def test_an_interrupt_before_anything_has_begun_is_one_line(tmp_path):
    """While torch is imported, which an interrupt would leave half done."""
    process = begun(["-X", "importtime", "-m", "reference_trainer", "train"], tmp_path)
    for line in process.stderr:
        if "torch._C" in line or "numpy" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    told = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, told) == (130, ["interrupted before anything had begun"])
    assert not list(tmp_path.iterdir())


def tracking(pid):
    """Return those of a process's own that are past their beginning: they have begun with torch."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    begun = [child for child in children if "libtorch" in Path(f"/proc/{child}/maps").read_text()]
    return [c for c in begun if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


def test_an_interrupt_of_a_command_s_processes_is_one_line(tmp_path):
    """Ctrl-C reaches all of them: what an estimate tracks, it tracks in processes of its own."""
    process = begun(["-m", "reference_trainer", "estimate", "--model", "1.3b"], tmp_path)
    while len(tracking(process.pid)) < min(2, os.cpu_count() or 1):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rnak", "4"], "the nearest is --relora.rank"),
        (["--colour", "4"], "unknown option --colour (see --help)"),
        (["foo"], "'foo' is neither an option nor the value of one"),
    ],
)
def test_what_is_unknown_is_named_and_the_nearest_only_if_it_is_near(given, message, capsys):
    assert main(["train", *given]) == 2
    assert message in capsys.readouterr().err


def test_prepared_data_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "tokens", "--data.files", SOURCES, "--data.held_out", "0.2"]) == 0
    assert "--data.prepared tokens" in capsys.readouterr().out
    assert (tmp_path / "tokens" / "index.json").is_file()

"""A run that can no longer write, or hangs, says so and leaves its earlier files whole."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reference_trainer import train as training
from reference_trainer.checkpoint.find import complete_checkpoints
from reference_trainer.errors import UserError
from reference_trainer.logging.metrics import Metrics
from reference_trainer.main import main
from tests.faults.victims import NO_FAULT, Fault, attempt, output
from tests.trainer.runs import EVERY_CHECKPOINT, RUN, TINY, losses, rewound, train, trained

CHECKPOINTS = RUN / "checkpoints"


def no_file_larger_than_64k() -> None:
    """Have the system refuse to write more, as a disk does that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))


def read_only() -> None:
    """Let nothing be made among the checkpoints."""
    CHECKPOINTS.chmod(0o555)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what runs decide that nothing befalls, on one process and on two."""
    found = {}
    for size in (1, 2):
        directory = tmp_path_factory.mktemp(f"whole-{size}")
        assert attempt(TINY, directory, size, NO_FAULT) == [0] * size, output(directory)
        found[size] = trained(directory / RUN)
    return found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("what", "says"),
    [(no_file_larger_than_64k, "File too large"), (read_only, "Permission denied")],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_one_before(
    tmp_path, monkeypatch, whole, size, what, says
):
    """Whichever process it befalls; all hear of it before their next step is over."""
    monkeypatch.chdir(tmp_path)
    victim = size - 1 if what is no_file_larger_than_64k else 0
    fault = Fault("checkpoint", 3, what=what)
    codes = attempt(TINY, tmp_path, size, fault, victim=victim)
    said = output(tmp_path)
    assert codes == [2] * size, said
    target = CHECKPOINTS / "step-00000008"
    failing = (
        f"could not write {target} (once that is fixed, --resume continues from step-00000006)"
    )
    (error,) = (line for line in said.splitlines() if line.startswith("error"))
    assert failing in error
    assert says in error
    assert "Traceback" not in said
    assert [path.name for path in sorted(CHECKPOINTS.iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]
    assert max(losses(RUN)) <= 12  # where the next one would be written

    CHECKPOINTS.chmod(0o755)
    assert attempt(["--resume"], tmp_path, size, NO_FAULT, number=1) == [0] * size
    assert trained(RUN) == whole[size]


def test_a_full_disk_ends_the_run_at_the_checkpoint_before(tiny):
    """A real one, of 1.5 MiB; where a user may mount none, the test above stands for it."""
    space = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    mount = "mkdir runs && mount -t tmpfs -o size=1500k none runs"
    if subprocess.run([*space, mount], capture_output=True, check=False).returncode:
        pytest.skip("this system lets a user mount nothing")
    script = f'rmdir runs; {mount} && {{ "$@"; code=$?; ls runs/*/checkpoints; exit $code; }}'
    command = [sys.executable, "-m", "reference_trainer", "train", *tiny, *EVERY_CHECKPOINT]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [*space, script, "-", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    # Until the half checkpoint is gone, the log may find no space either.
    error, *others = (line for line in done.stderr.splitlines() if line)
    assert all("could not write runs/first-run/metrics.jsonl" in line for line in others)
    assert error.startswith("error: could not write runs/first-run/checkpoints/step-000000")
    assert error.endswith("No space left on device")
    left = done.stdout.splitlines()[-3:]
    assert f"--resume continues from {left[-1]}" in error


def test_a_log_that_finds_no_space_is_named(tmp_path):
    error = "could not write /dev/full .*--resume continues.*: No space left on device"
    with Metrics(tmp_path, writes=True) as metrics:
        metrics._file.close()
        metrics._file = Path("/dev/full").open("a")  # noqa: SIM115 - which metrics close
        with pytest.raises(UserError, match=error):
            metrics.write({"event": "compiled", "step": 1, "phase": "relora", "graphs": 2})


def test_a_directory_that_is_removed_is_not_made_again(tiny, monkeypatch, capsys):
    sound, calls = training.forward_backward, []

    def removing(*arguments):
        calls.append(None)
        if len(calls) == 9:
            shutil.rmtree(RUN.rename("gone"), ignore_errors=True)  # a checkpoint may be under way
        return sound(*arguments)

    monkeypatch.setattr(training, "forward_backward", removing)
    assert main(["train", *tiny]) == 2
    error = capsys.readouterr().err
    assert "could not write runs/first-run/checkpoints/step-000000" in error
    assert "No such file or directory" in error or "has been removed" in error
    assert not RUN.exists()
    assert len(calls) <= 14


def test_a_read_only_place_is_refused_before_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir(mode=0o555)
    assert attempt(TINY, tmp_path, 1, NO_FAULT) == [2]
    assert "Permission denied" in output(tmp_path)
    assert list(Path("runs").iterdir()) == []


def test_the_clock_does_not_matter(tiny):
    """The newest checkpoint is the one of the most steps, whatever the files' times say."""
    train(*tiny, *EVERY_CHECKPOINT, "--name", "whole")
    again = rewound("whole", 16)
    generator = random.Random(0)
    for file in again.rglob("*"):
        os.utime(file, (0, generator.randrange(2**32)))
    train("--resume", "--name", again.name)
    assert min(set(losses(again)) - set(range(16))) == 16
    assert trained(again) == trained(Path("runs/whole"))


class TestAHang:
    def test_the_others_end_and_name_who_does_not_answer(self, tmp_path):
        """A process that is stopped in the middle of a step."""
        arguments = [*TINY, "--parallel.timeout", "0.05"]
        codes = attempt(arguments, tmp_path, 2, Fault("step", 12, what=stop), victim=1)
        assert codes[0] == 2
        said = (tmp_path / "said-0-0").read_text()
        assert "error on process rank 0" in said
        assert "1 of 2 processes (process rank 1) ended" in said
        assert "did not answer for 0.05 minutes (parallel.timeout)" in said
        newest = complete_checkpoints(tmp_path / CHECKPOINTS)[-1]
        assert newest.name in ("step-00000006", "step-00000008")  # which is written meanwhile
        assert attempt(["--resume"], tmp_path, 2, NO_FAULT, number=1) == [0, 0]


def stop() -> None:
    """Do nothing more, and do not end either."""
    os.kill(os.getpid(), signal.SIGSTOP)

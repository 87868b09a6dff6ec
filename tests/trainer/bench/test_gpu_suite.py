"""The GPU suite: a stage that fails costs only itself, and results found so far are kept."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reference_trainer.bench.commands.gpu_suite import _here
from reference_trainer.bench.suite.jobs import EXPECTED, JOBS, Job
from reference_trainer.bench.suite.records import Report, read, results_of
from reference_trainer.bench.suite.runner import run_jobs
from reference_trainer.bench.suite.sizes import gpu_of
from reference_trainer.bench.suite.table import off, table
from reference_trainer.files import locked
from reference_trainer.main import main

ROOT = Path(__file__).parents[3]


class Python(Job):
    """A job that runs a line of Python."""

    def command(self, directory: Path) -> list[str]:
        return [sys.executable, "-c", *self.arguments]


def python(name: str, line: str, *, limit: float = 60) -> Python:
    return Python(1, "a stage", name, "module", limit, (line,))


def statuses(directory: Path) -> dict[str, str]:
    return {r["job"]: r["status"] for r in read(directory) if r["event"] == "end"}


class TestAStageCostsOnlyItself:
    def test_killed_out_of_memory_failed_and_hanging_jobs_leave_the_others_alone(self, tmp_path):
        jobs = [
            python("killed", "import os; os.kill(os.getpid(), 9)"),
            python("memory", "import torch; torch.empty(2**60)"),
            python("failed", "raise ValueError('rank must be 1 at least')"),
            python("silent", "raise SystemExit(3)"),
            python("odd", "import os; os.kill(os.getpid(), 40)"),
            python("spoke of it", "print('MemoryError\\n' + 'x\\n' * 9); raise ValueError('no')"),
            python("hangs", "import time; time.sleep(600)", limit=0.5),
            python("well", "pass"),
        ]
        assert run_jobs(jobs, tmp_path, seconds=60) == []
        assert statuses(tmp_path) == {
            "killed": "killed",
            "memory": "out of memory",
            "failed": "failed",
            "silent": "failed",
            "odd": "killed",
            "spoke of it": "failed",
            "hangs": "timed out",
            "well": "ok",
        }
        errors = {r["job"]: r["error"] for r in read(tmp_path) if r["event"] == "end"}
        assert errors["killed"] == "by SIGKILL"
        assert "rank must be 1 at least" in errors["failed"]
        assert errors["silent"] == "exit code 3, no output"
        assert errors["odd"] == "by signal 40"

    def test_nothing_of_a_job_is_left_when_its_time_is_up(self, tmp_path):
        child = "import time; time.sleep(600)"
        line = (
            "import pathlib, subprocess, sys, tempfile, time;"
            "directory = pathlib.Path(tempfile.gettempdir());"
            f"p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
            f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(p.pid));"
            "(directory / 'large').write_text('x');"
            f"pathlib.Path({str(tmp_path / 'where')!r}).write_text(str(directory));"
            "time.sleep(600)"
        )
        run_jobs([python("hangs", line, limit=3)], tmp_path, seconds=60)
        _gone(int((tmp_path / "child").read_text()))
        assert not Path((tmp_path / "where").read_text()).exists()

    def test_jobs_for_which_no_time_is_left_are_returned_and_shown_as_not_run(self, tmp_path):
        jobs = [python("one", "import time; time.sleep(600)"), python("two", "pass")]
        assert run_jobs(jobs, tmp_path, seconds=6) == [jobs[1]]
        assert statuses(tmp_path) == {"one": "timed out"}
        assert "| two | not run |" in table(read(tmp_path), jobs)


class TestASuiteGoesOn:
    def test_with_what_has_not_ended_well_the_untried_first(self, tmp_path):
        order = tmp_path / "order"
        note = f"import pathlib; open({str(order)!r}, 'a').write('{{}} '); "
        flag = tmp_path / "mended"
        jobs = [
            python("well", note.format("well")),
            python("fails", note.format("fails") + f"assert pathlib.Path({str(flag)!r}).exists()"),
        ]
        run_jobs(jobs, tmp_path, seconds=60)
        flag.touch()
        run_jobs([*jobs, python("new", note.format("new"))], tmp_path, seconds=60)
        assert order.read_text().split() == ["well", "fails", "new", "fails"]
        assert set(statuses(tmp_path).values()) == {"ok"}

    def test_after_a_kill_that_cut_a_line_off(self, tmp_path):
        Report(tmp_path, "one").measured("time", 2.0)
        with results_of(tmp_path).open("ab") as file:
            file.write(b'{"event": "measu')
        assert len(read(tmp_path)) == 1
        Report(tmp_path, "two").measured("time", 3.0)
        assert [record["value"] for record in read(tmp_path)] == [2.0, 3.0]

    def test_not_in_the_results_of_another_machine(self, tmp_path, capsys):
        first = {"device": "another GPU", "torch": "2", "cuda": True, "gpu": None}
        Report(tmp_path, "").write("suite", **first)
        before = results_of(tmp_path).read_bytes()
        assert main(["bench", "gpu-suite", "--out", str(tmp_path)]) == 2
        assert "another GPU" in capsys.readouterr().err
        assert results_of(tmp_path).read_bytes() == before

    def test_not_beside_another_one_in_the_same_directory(self, tmp_path, capsys):
        Report(tmp_path, "").write("suite", **_here())
        before = results_of(tmp_path).read_bytes()
        with locked(results_of(tmp_path)):
            assert main(["bench", "gpu-suite", "--out", str(tmp_path)]) == 2
        assert "is in use" in capsys.readouterr().err
        assert results_of(tmp_path).read_bytes() == before

    @pytest.mark.parametrize(
        "text",
        [
            "no JSON\n",
            "[1, 2]\n",
            '{"value": 1}\n',
            '{"event": "end"}\n',
            '{"event": "start", "step": 0}\n',
            '{"event": "measured", "job": "one", "what": "time", "value": 1}\n',
            '{"event": "suite", "job": ""}\n',
        ],
    )
    def test_not_in_a_file_of_something_else(self, tmp_path, text, capsys):
        results_of(tmp_path).write_text(text)
        assert main(["bench", "gpu-suite", "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "is damaged" in error or "another directory" in error
        assert results_of(tmp_path).read_text() == text

    @pytest.mark.parametrize("minutes", ["0", "-1", "nan", "1e9"])
    def test_not_for_a_time_that_is_none(self, tmp_path, minutes, capsys):
        out = tmp_path / "new"
        assert main(["bench", "gpu-suite", "--minutes", minutes, "--out", str(out)]) == 2
        assert "--minutes must be between 0 and 1440" in capsys.readouterr().err
        assert not out.exists()


class TestTheTable:
    def test_sets_the_roofline_and_full_rank_beside_what_was_measured(self, tmp_path):
        job = Job(4, "a block", "block", "blocks", 1)
        Report(tmp_path, "").write(
            "suite", device="H100", torch="2", python="3", date="2026-01-01", cuda=True, gpu="h100"
        )
        report = Report(tmp_path, "block")
        report.measured("full", 2.0, expected=1.9)
        report.measured("ours", 1.5, expected=1.0, baseline="full")
        report.measured("peak", 2**30, "bytes")
        shown = table(read(tmp_path), [job])
        assert "| full | 2 s | 1.9 s | 1.05 |  |  |" in shown
        assert "| ours | 1.5 s | 1 s | 1.50 | 0.750 | 0.526 |" in shown
        assert "| peak | 1.000 GiB |  |  |  |  |" in shown
        assert "| block | not run |" in shown
        assert off(read(tmp_path)) == ["ours: 1.50"]

    def test_has_the_latest_of_each_figure(self, tmp_path):
        report = Report(tmp_path, "block")
        report.measured("time", 2.0)
        report.measured("time", 3.0)
        shown = table(read(tmp_path), [Job(4, "a block", "block", "blocks", 1)])
        assert "3 s" in shown
        assert "2 s" not in shown

    def test_every_stage_is_a_module_that_takes_what_its_job_gives(self):
        assert [job.stage for job in JOBS] == sorted(job.stage for job in JOBS)
        assert {job.stage for job in JOBS} == set(range(1, 10))
        for job in (*JOBS, EXPECTED):
            assert (ROOT / f"reference_trainer/bench/suite/{job.module}.py").is_file()


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", None),
    ],
)
def test_a_device_is_known_by_its_name(name, gpu):
    assert gpu_of(name) == gpu


def test_what_the_gpu_suite_imports_needs_no_package_that_only_options_and_parquet_need(tmp_path):
    modules = {f"reference_trainer.bench.suite.{job.module}" for job in (*JOBS, EXPECTED)}
    needless = ("pydantic", "pyarrow", "peft", "matplotlib", "jinja2", "transformers", "pytest")
    absent = f"import sys; sys.modules |= dict.fromkeys({needless});"
    line = (
        f"{absent} import {', '.join(sorted(modules))}, reference_trainer.bench.commands.gpu_suite"
    )
    subprocess.run([sys.executable, "-c", line], check=True, cwd=ROOT)


@pytest.mark.slow
class TestTheWholeSuiteOnACPU:
    def test_every_stage_reports_though_one_is_killed_and_one_out_of_memory(self, tmp_path):
        began = time.monotonic()
        command = [sys.executable, "-m", "reference_trainer", "bench", "gpu-suite"]
        run = [*command, "--minutes", "5", "--out", str(tmp_path / "suite")]
        suite = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        os.kill(_pid(tmp_path / "suite", "products"), signal.SIGKILL)
        # Not a byte more than it has: whatever it allocates next fails.
        resource.prlimit(_pid(tmp_path / "suite", "step, full"), resource.RLIMIT_AS, (1, 1))
        shown, _ = suite.communicate()
        assert suite.returncode == 0
        assert time.monotonic() - began < 300
        found = statuses(tmp_path / "suite")
        assert found.pop("products") == "killed"
        assert found.pop("step, full") in ("out of memory", "failed", "killed")
        assert found == {job.name: "ok" for job in (*JOBS, EXPECTED) if job.name in found}
        assert len(found) == len(JOBS) + 1 - 2

        again = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(statuses(tmp_path / "suite").values()) == {"ok"}
        for job in JOBS:
            assert f"**{job.stage}. {job.title}**" in again.stdout
        assert "| killed: by SIGKILL |" in shown
        assert (tmp_path / "suite" / "table.md").read_text() in again.stdout + "\n"
        assert len(list((tmp_path / "suite").iterdir())) <= 8

    @pytest.mark.parametrize(("number", "code"), [("TERM", 130), ("HUP", 130), ("KILL", -9)])
    def test_a_suite_that_is_stopped_leaves_no_process(self, tmp_path, number, code):
        command = [sys.executable, "-m", "reference_trainer", "bench", "gpu-suite"]
        suite = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT)
        pids = [_pid(tmp_path, "machine"), _pid(tmp_path, "expected")]
        time.sleep(5)  # jobs import torch, and look for their parent from then on
        suite.send_signal(signal.Signals[f"SIG{number}"])
        assert suite.wait(30) == code
        for pid in pids:
            _gone(pid)


def _pid(directory: Path, job: str) -> int:
    for _ in range(3000):
        file = results_of(directory)
        lines = file.read_text().splitlines() if file.exists() else []
        begun = {r["job"]: r for r in map(json.loads, lines) if r["event"] == "begin"}
        if job in begun:
            return int(begun[job]["pid"])
        time.sleep(0.05)
    raise TimeoutError(f"{job} has not begun")


def _gone(pid: int) -> None:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} still runs")

"""Stage 6: a run that is stopped by a signal, resumed, and exported."""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes

_STOPPED = 75


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Train with the command `train`, send SIGTERM in the low-rank phase, and resume the run."""
    if find_spec("pydantic") is None:
        raise ModuleNotFoundError("`train` needs pydantic, which is not installed")
    steps, sequences, length = sizes.run
    with tempfile.TemporaryDirectory() as directory:
        given = ["--runs", directory, "--name", "suite"]
        options = {
            "steps": steps,
            "model.preset": sizes.preset,
            "batch.sequences": sequences,
            "batch.micro": sequences,
            "batch.length": length,
            "relora.warm_start": steps // 4,
            "relora.every": steps // 4,
            "relora.rank": sizes.rank,
            "log.every": 1,
            "log.evaluate_every": steps,
            "checkpoint.every": steps,
        }
        if device.type == "cpu":  # the default text takes too long to prepare
            text = Path(directory) / "text.txt"
            text.write_text("".join(f"{n} squared is {n * n}\n" for n in range(20_000)))
            options["data.files"] = str(text)
        given += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        log = Path(directory) / "suite" / "metrics.jsonl"
        command = [sys.executable, "-m", "reference_trainer", "train", "--quiet"]
        process = subprocess.Popen([*command, *given])
        while len(_steps(log, "relora")) < 2:
            if process.poll() is not None:
                code = process.returncode
                raise ValueError(f"the run must continue until it is stopped; got exit code {code}")
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code != _STOPPED:
            raise ValueError(f"a stopped run must end with exit code {_STOPPED}; got {code}")
        report.measured("run: from SIGTERM to its end", time.monotonic() - began)
        resume = ["--resume", "--runs", directory, "--name", "suite"]
        code = subprocess.run([*command, *resume], check=False).returncode
        exported = Path(directory) / "suite" / "export" / "model.safetensors"
        if code or not exported.is_file():
            raise ValueError(f"a resumed run must end with exit code 0 and an export; got {code}")
        _describe(report, log)


def _describe(report: Report, log: Path) -> None:
    for phase in ("warm-start", "relora"):
        found = _steps(log, phase)
        if found:
            speed = statistics.median(record["tokens_per_second"] for record in found)
            report.measured(f"run, {phase}: tokens a second", speed, "tokens/s")
            report.measured(f"run, {phase}: last loss", found[-1]["loss"], "nats")
    compiled = [r for r in _records(log) if r["event"] == "compiled"]
    for record in compiled:
        report.measured(f"run, {record['phase']}: graphs", record["graphs"], "graphs")


def _steps(log: Path, phase: str) -> list[dict[str, Any]]:
    return [r for r in _records(log) if r["event"] == "step" and r["phase"] == phase]


def _records(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    text = log.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

"""The runner of the suite's jobs: one process after the other, each with a time limit."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reference_trainer.bench.suite.jobs import Job
from reference_trainer.bench.suite.records import Report, read
from reference_trainer.logging.console import log

_LOG = "log.txt"
_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "MemoryError")
_LAST = 5  # last lines of a job's output, which contain its error
_LEAST = 5.0  # seconds; with less time left, no job is started


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    log: Path


def run_jobs(
    jobs: Sequence[Job], directory: Path, *, seconds: float, beside: Job | None = None
) -> list[Job]:
    """Run each job that has not yet succeeded; return the jobs for which no time was left.

    Jobs that have not been tried run first. A job that fails, is killed, or runs out of memory or
    time does not affect the others: its end is recorded, and its earlier records remain.

    Args:
        jobs: jobs in order.
        directory: directory of the results and the log.
        seconds: time limit of all jobs together.
        beside: job that runs at the same time as the others.
    """
    deadline = time.monotonic() + seconds
    ended = {record["job"]: record["status"] for record in _ends(directory)}
    todo = [job for job in jobs if ended.get(job.name) != "ok"]
    todo.sort(key=lambda job: job.name in ended)
    with contextlib.ExitStack() as stack:
        companion = None
        if beside is not None and ended.get(beside.name) != "ok":
            companion = stack.enter_context(_started(beside, directory, min(beside.limit, seconds)))
        for index, job in enumerate(todo):
            left = deadline - time.monotonic()
            if left < _LEAST:
                return todo[index:]
            log.info(f"stage {job.stage}: {job.title} ({job.name})")
            with _started(job, directory, min(job.limit, left)) as running:
                _finish(running, directory)
        if companion is not None:
            _finish(companion, directory)
    return []


def _ends(directory: Path) -> list[dict[str, str]]:
    return [record for record in read(directory) if record["event"] == "end"]


@contextlib.contextmanager
def _started(job: Job, directory: Path, limit: float) -> Iterator[_Running]:
    """Start a job in its own process group, which is killed when the block ends."""
    temporary = tempfile.mkdtemp(prefix="suite-")
    file = directory / _LOG if job.stage else directory / f"{job.name}-{_LOG}"
    with file.open("ab") as output:
        output.write(f"--- {job.name}\n".encode())
        output.flush()
        process = subprocess.Popen(
            job.command(directory),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": temporary},
            start_new_session=True,
        )
    try:
        Report(directory, job.name).write("begin", pid=process.pid)
        yield _Running(job, process, time.monotonic(), limit, file)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(running: _Running, directory: Path) -> None:
    """Wait until a job ends or its time is up, and record how it ended."""
    job, process = running.job, running.process
    try:
        code = process.wait(max(running.began + running.limit - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        status, error = "timed out", f"not done after {running.limit:.0f} s"
    else:
        status, error = _status(code, running.log)
    taken = round(time.monotonic() - running.began, 1)
    Report(directory, job.name).write(
        "end", stage=job.stage, status=status, seconds=taken, error=error
    )
    if status != "ok":
        log.warning(f"stage {job.stage}, {job.name}: {status}: {error}")


def _status(code: int, file: Path) -> tuple[str, str]:
    if code == 0:
        return "ok", ""
    if code < 0:
        names = {one.value: one.name for one in signal.Signals}
        return "killed", f"by {names.get(-code, f'signal {-code}')}"
    own = file.read_text(encoding="utf-8", errors="replace").split("\n--- ")[-1]
    lines = [line.strip()[:400] for line in own.splitlines()[1:] if line.strip()]
    of_memory = [line for line in lines[-_LAST:] if any(sign in line for sign in _OF_MEMORY)]
    if of_memory:
        return "out of memory", of_memory[-1]
    return "failed", lines[-1] if lines else f"exit code {code}, no output"

"""The process of a job: `python -m reference_trainer.bench.suite JOB --out DIR`."""

import argparse
import faulthandler
import os
import signal
import threading
import time
from importlib import import_module
from pathlib import Path

import torch

from reference_trainer.bench.suite.jobs import EXPECTED, JOBS, job_of
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import sizes


def main() -> None:
    """Run the job named on the command line, with a fixed seed."""
    parser = argparse.ArgumentParser(description="Run a job of the GPU suite.")
    parser.add_argument("job", choices=[job.name for job in (*JOBS, EXPECTED)])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    faulthandler.enable()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.manual_seed(0)
    job, chosen = job_of(given.job), sizes()
    device = torch.device("cpu" if job is EXPECTED else chosen.device)
    module = import_module(f"reference_trainer.bench.suite.{job.module}")
    module.run(Report(given.out, job.name), chosen, device, *job.arguments)


def _end_with(parent: int) -> None:
    """Kill this job's process group once the suite's process is gone, which sends no signal."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()

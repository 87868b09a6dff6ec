"""The jobs of the suite: nine stages, each of one or more jobs that run one after the other."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A process of the suite.

    Args:
        stage: number of the stage, from 1 to 9; 0 for the job that runs beside all stages.
        title: title of the stage.
        name: unique name of the job.
        module: module of this package that has the job's function `run`.
        limit: number of seconds after which the job is killed.
        arguments: further arguments of `run`.
    """

    stage: int
    title: str
    name: str
    module: str
    limit: float
    arguments: tuple[str, ...] = ()

    def command(self, directory: Path) -> list[str]:
        """Return the command that runs the job."""
        program = [sys.executable, "-m", "reference_trainer.bench.suite"]
        return [*program, self.name, "--out", str(directory)]


# In order of importance, because time may run out before the last jobs.
JOBS = (
    Job(1, "the machine", "machine", "machine", 60),
    Job(2, "tests that need a GPU", "tests", "gpu_tests", 150),
    Job(3, "products", "products", "products", 90),
    Job(4, "a block", "block", "blocks", 150),
    Job(5, "the model's step", "step, full", "steps", 150, ("full",)),
    Job(5, "the model's step", "step, shard", "steps", 150, ("shard",)),
    Job(5, "the model's step", "step, replicate", "steps", 150, ("replicate",)),
    Job(6, "a run stopped and resumed", "run", "training", 200),
    Job(7, "a checkpoint", "checkpoint", "stall", 120),
    Job(8, "selection over two processes", "selection", "selection", 60),
    Job(9, "restart and pruning", "restart", "restarting", 60),
)
EXPECTED = Job(0, "the roofline", "expected", "expected", 540)


def job_of(name: str) -> Job:
    """Return the job called `name`."""
    return next(job for job in (*JOBS, EXPECTED) if job.name == name)

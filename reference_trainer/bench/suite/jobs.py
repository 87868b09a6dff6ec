"""The jobs of the suite: its nine stages, each of one process or of several in turn."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A process of the suite.

    Args:
        stage: its number, from 1 to 9; 0 beside all of them.
        title: of the stage.
        name: of the job; unique.
        module: of this package, with a function `run`.
        limit: seconds after which it is killed.
        arguments: of that function, after the usual ones.
    """

    stage: int
    title: str
    name: str
    module: str
    limit: float
    arguments: tuple[str, ...] = ()

    def command(self, directory: Path) -> list[str]:
        """Return the command that runs it."""
        program = [sys.executable, "-m", "reference_trainer.bench.suite"]
        return [*program, self.name, "--out", str(directory)]


# In the order of value: what time is left for runs first.
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
    """Return the job of this name."""
    return next(job for job in (*JOBS, EXPECTED) if job.name == name)

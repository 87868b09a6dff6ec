"""Several nodes by Slurm and torchrun: the committed script itself, with a Slurm that is a stub.

The stub starts each node's launcher on this machine; they meet through torchrun's rendezvous.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.runs import losses, records, train

ROOT = Path(__file__).parents[2]
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames $SLURM_JOB_NODELIST" ] && printf '127.0.0.1\\nlocalhost\\n'
"""
SRUN = """#!/bin/bash
echo "srun $*" >> "$STUB_LOG"
while [[ "$1" == --* ]]; do shift; done
pids=()
for node in $(seq "$SLURM_JOB_NUM_NODES"); do
    SLURM_NODEID=$((node - 1)) "$@" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""


@pytest.fixture
def slurm(tmp_path):
    """Return the environment of a job of two nodes with a process each."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "STUB_LOG": str(tmp_path / "srun.log"),
        "SLURM_JOB_ID": str(os.getpid()),  # of which the port is made
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }


def submit(arguments, environment, cwd):
    command = ["bash", str(ROOT / "docs/relora.sbatch"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_two_nodes_compute_what_one_process_does_and_a_requeued_job_goes_on(tiny, tmp_path, slurm):
    few = [*tiny, "--log.rank_sites", "0"]
    train(*few, "--name", "one")
    done = submit([*few, "--name", "two"], slurm, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    assert records(two, "start")[0]["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    first, second = (load_file(run / "export/model.safetensors") for run in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)
    assert done.stdout.count("picture:") == 1  # the first process alone reports

    again = submit(["--name", "two"], {**slurm, "SLURM_RESTART_COUNT": "1"}, tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(records(two, "start")) == 2
    log = Path(slurm["STUB_LOG"]).read_text().splitlines()
    assert "--kill-on-bad-exit=1" in log[0]
    assert log[0].endswith("train " + " ".join([*few, "--name", "two"]))
    assert log[1].endswith("train --name two")


def test_errors_come_from_every_process_and_what_all_found_from_one(tiny, tmp_path, slurm):
    """A wrong option is found by each by itself, a run that is there already by the first."""
    done = submit([*tiny, "--relora.rank", "99"], slurm, tmp_path)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error on process rank" in line]
    assert {line.split(" (")[0].split("error ")[1] for line in told} == {
        "on process rank 0",
        "on process rank 1",
    }
    assert all("rank must be between 1 and" in line for line in told)

    (tmp_path / "runs/first-run").mkdir(parents=True)
    done = submit(tiny, slurm, tmp_path)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "holds a run already" in line]
    assert told == [told[0]]
    assert told[0].startswith("error: ")

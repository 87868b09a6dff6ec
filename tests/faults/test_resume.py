"""A run goes on from any of its steps, to the same bytes, and over any number of processes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference_trainer import train as training
from reference_trainer.checkpoint.find import complete_checkpoints
from reference_trainer.options import resolve
from tests.faults.victims import NO_FAULT, attempt, output
from tests.trainer.runs import TINY, losses, records, rewound, train, trained

SHORT = ("--steps", "14", "--relora.warm_start", "3", "--relora.every", "3", "--optim.warmup", "1")
EVERY_STEP = ("--checkpoint.every", "1", "--checkpoint.keep", "99")


@pytest.mark.parametrize(
    "option",
    [
        ("--parallel.checkpoint_activations", "selective"),
        pytest.param(
            ("--parallel.compile", "true"),
            marks=[
                pytest.mark.slow,
                # Dynamo looks at .grad of what FSDP2 has gathered, and torch warns of it.
                pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
            ],
        ),
    ],
    ids=["recomputing", "compiled"],
)
def test_every_step_is_one_to_resume_from(tiny, option):
    """Of a run that hands off, restarts three times, and accumulates gradients."""
    train(*tiny, *option, *EVERY_STEP, *SHORT, "--name", "whole")
    whole = Path("runs/whole")
    restarts, hand_off = [6, 9, 12], 3
    assert [record["step"] for record in records(whole, "restart")] == restarts
    expected = trained(whole)
    steps = [int(one.name[-8:]) for one in complete_checkpoints(whole / "checkpoints")]
    assert steps == list(range(1, 15))
    if "--parallel.compile" in option:  # which takes half a minute each
        steps = [hand_off, 5, restarts[1], restarts[2]]
    for step in steps:
        again = rewound("whole", step)
        training.train(resolve(again / "config.yaml", {"name": again.name}), resume=True)
        found = trained(again)
        assert [name for name in expected if found[name] != expected[name]] == [], step
        assert losses(again) == losses(whole), step


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, request):
    """Return the directory of a run on two processes that kept every fourth checkpoint."""
    directory = tmp_path_factory.mktemp("of-two")
    batch = ("--batch.sequences", "12", "--batch.micro", "6", "--checkpoint.keep", "99")
    arguments = [*TINY, *batch, "--steps", "23", "--name", "whole"]
    codes = attempt(arguments, directory, 2, NO_FAULT)
    assert codes == [0, 0], output(directory)
    return directory


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("step", [4, 6, 16], ids=["warm start", "hand-off", "restart"])
def test_a_run_of_two_processes_goes_on_over_others(of_two, monkeypatch, size, step):
    """The batch stays, its split changes: 12 sequences by one process in two rounds, or 3 by 4."""
    monkeypatch.chdir(of_two)
    again = rewound("whole", step).rename(f"runs/of-{size}-from-{step}")
    arguments = ["--resume", "--name", again.name]
    codes = attempt(arguments, of_two, size, NO_FAULT)
    assert codes == [0] * size, output(of_two)
    assert records(again, "start")[-1]["processes"] == size
    expected = losses(Path("runs/whole"))
    assert losses(again) == pytest.approx(expected, abs=1e-5)
    assert sorted(expected) == list(range(23))
    one, other = (
        load_file(run / "export/model.safetensors") for run in (Path("runs/whole"), again)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-4, msg=name)

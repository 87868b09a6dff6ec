"""A compiled run: one graph for all blocks of a phase, whatever ran first, and the same bytes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from reference_trainer import train as training
from reference_trainer.model.llama import Block
from reference_trainer.options import resolve
from tests.trainer.runs import EVERY_CHECKPOINT, losses, records, rewound, train, trained

# Dynamo looks at .grad of what FSDP2 has gathered, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

BLOCKS = 24
DEEP = ("--model.layers", str(BLOCKS), "--model.hidden_size", "16", "--steps", "14")
DEEP += ("--relora.warm_start", "3", "--relora.every", "3", "--optim.warmup", "1")


@pytest.fixture
def compiler(monkeypatch):
    """Count the graphs of blocks and the calls of training; compile what torch would, quickly."""
    counter = CompileCounterWithBackend("aot_eager")
    counter.calls = 0

    def backend(graph, inputs):
        compiled = counter(graph, inputs)

        def run(*arguments):
            counter.calls += torch.is_grad_enabled()
            return compiled(*arguments)

        return run

    def compile_(block):
        nn.Module.compile(block, backend=backend, fullgraph=True)

    monkeypatch.setattr(Block, "compile", compile_, raising=False)
    original = torch.compile
    monkeypatch.setattr(
        "torch.compile", lambda f, **options: original(f, **options) if options else f
    )  # the loss stays as it is
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("precision", "steps"),
    [
        ("bf16", [8]),  # within a cycle
        pytest.param("fp32", [3, 12], marks=pytest.mark.slow),  # the hand-off, before a restart
        pytest.param("bf16", [3, 12], marks=pytest.mark.slow),
    ],
)
def test_it_trains_every_block_by_one_graph_and_resumes_to_the_same_bytes(
    tiny, compiler, precision, steps
):
    chosen = ("--parallel.compile", "true", "--parallel.precision", precision)
    train(*tiny, *DEEP, *chosen, *EVERY_CHECKPOINT, "--name", "whole")
    whole = Path("runs/whole")
    assert [record["step"] for record in records(whole, "restart")] == [6, 9, 12]
    assert compiler.frame_count == 4  # evaluation and training, of either phase
    assert compiler.calls == 14 * BLOCKS * 2  # micro-steps
    assert [record["graphs"] for record in records(whole, "compiled")] == [2, 2]
    expected = trained(whole)
    for step in steps:
        again = rewound("whole", step)
        training.train(resolve(again / "config.yaml", {"name": again.name}), resume=True)
        found = trained(again)
        assert [name for name in expected if found[name] != expected[name]] == [], step
        assert losses(again) == losses(whole), step

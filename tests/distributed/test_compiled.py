"""Compiled blocks share one graph and train as uncompiled ones do, on several processes too."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import clip_grad_norm_

import relora_core as relora
from reference_trainer.config import BatchConfig, Config, ModelConfig, ParallelConfig, ReLoRAConfig
from reference_trainer.distributed import lay_world
from reference_trainer.evaluate import evaluate
from reference_trainer.phases import phases
from reference_trainer.train import forward_backward
from reference_trainer.train_state import build_state, fill_
from tests.distributed.processes import full, on_processes

BLOCKS, STEPS, VOCAB, LENGTH, SEQUENCES = 24, 10, 50, 8, 12
# Dynamo looks at .grad of what FSDP2 has gathered, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


class Constant:
    """Held-out windows of one token."""

    def __len__(self):
        return SEQUENCES

    def read(self, numbers):
        return torch.full((len(numbers), LENGTH + 1), 7)


def run(rank, world_size, precision, compiled):
    counter = CompileCounterWithBackend("aot_eager")
    calls = [0]

    def backend(graph, inputs):
        inner = counter(graph, inputs)

        def called(*arguments):
            calls[0] += torch.is_grad_enabled()
            return inner(*arguments)

        return called

    plain = nn.Module.compile
    nn.Module.compile = lambda block: plain(block, backend=backend, fullgraph=True)
    config = Config(
        steps=STEPS,
        model=ModelConfig("9m", hidden_size=20, intermediate_size=27, layers=BLOCKS, heads=2),
        batch=BatchConfig(sequences=SEQUENCES, length=LENGTH, micro=SEQUENCES),
        relora=ReLoRAConfig(warm_start=0, rank=3, every=3, warmup=1),
        parallel=ParallelConfig("cpu", precision, compile=compiled),
    )
    world = lay_world(config.parallel, torch.device("cpu"))
    (phase,) = phases(config)
    state = build_state(config, phase, config.model.shape(VOCAB), world)
    state.model.loss.of_chunk = type(state.model.loss)().of_chunk  # the loss is not what is counted
    fill_(state, config, None, world)
    torch.rand(rank + 1)
    evaluate(state.model, Constant(), config, world)
    losses, graphs = [], []
    for step in range(STEPS):
        if phase.restarts_at(step):
            relora.restart_(state.model, state.optimizer, timeout=world.patience)
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
        loss = forward_backward(
            state.model, batch.view(1, world_size, -1, LENGTH + 1)[:, rank], world
        )
        clip_grad_norm_(state.parameters.values(), config.optim.clip)
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        losses.append(world.mean(loss))
        graphs.append(counter.frame_count)
    nn.Module.compile = plain
    weights = {n: full(t) for n, t in relora.merged_state_dict(state.model).items()}
    counts = torch.tensor([*graphs, calls[0]])
    return {"losses": torch.tensor(losses), "counts": counts, **weights}


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_24_blocks_train_by_one_graph_over_restarts(tmp_path, precision):
    compiled = on_processes(run, 2, tmp_path / "compiled", precision, True)
    (expected,) = on_processes(run, 1, tmp_path / "one", precision, False)
    for found in compiled:
        *graphs, calls = found.pop("counts").tolist()
        assert graphs == [2] * STEPS  # of evaluation, and of training
        assert calls == BLOCKS * STEPS
        tolerance = 1e-4 if precision == "fp32" else 2e-2
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance)

"""Bytes on the wire: the same on real and on simulated processes, and by formula."""

import pytest
import torch
import torch.distributed as dist

from reference_trainer.bench.communication import (
    measure_traffic,
    sent_at_depth,
    sent_by,
    sent_in_step,
)
from reference_trainer.bench.layouts import FULL, REPLICATE, SHARD, Step, layouts, pretended
from reference_trainer.bench.results import total
from reference_trainer.flops import block_matrices
from reference_trainer.model.llama import LlamaShape, preset
from tests.distributed.processes import on_processes

EVEN = LlamaShape(32, 48, 2, 2, 2, 64)
UNEVEN = LlamaShape(20, 26, 2, 2, 2, 41)
# For torch 2.8, which remembers, by shape, the mesh of a world that is gone.
OTHER = LlamaShape(24, 40, 2, 2, 2, 48)
SIZES = {"rank": 8, "length": 8, "sequences": 1}


def on_real(rank, world_size, shape):
    torch.manual_seed(rank)
    found = {}
    for layout in layouts(world_size, node=2):
        record = measure_traffic(Step(layout, shape, **SIZES))
        for part in ("step", "restart"):
            for sent in record.get(part, []):
                key = [str(sent[name]) for name in ("collective", "processes", "stride")]
                numbers = torch.tensor([sent["calls"], sent["bytes"]])
                found["/".join([layout.name, part, *key])] = numbers
    return found


def on_pretended(processes, shape):
    with pretended(processes):
        return on_real(0, processes, shape)


@pytest.mark.parametrize(
    ("processes", "shape"),
    [(2, UNEVEN), (3, UNEVEN), pytest.param(4, OTHER, marks=pytest.mark.slow)],
)
def test_pretended_processes_send_what_real_ones_do(tmp_path, processes, shape):
    expected = on_pretended(processes, shape)
    assert len(expected) > 6
    for result in on_processes(on_real, processes, tmp_path / "ranks", shape):
        assert {k: v.tolist() for k, v in result.items()} == {
            k: v.tolist() for k, v in expected.items()
        }


def by_hand(layout, shape, processes, rank):
    """Return the bytes of a step: per parameter, from what FSDP2 does with it.

    Of a block it gathers everything twice in bf16 and reduces gradients in fp32; the root stays
    gathered between forward and backward. After a step, merged copies need A in fp32; whole ones
    are gathered then, and not in the step.
    """
    d, matrices = shape.hidden_size, block_matrices(shape)
    root = 2 * shape.vocab_size * d + d
    bases = shape.layers * sum(out * inner for out, inner in matrices)
    factors = shape.layers * sum(rank * (out + inner) for out, inner in matrices)
    trained = shape.layers * 2 * d + (factors if layout.low_rank else bases)
    if layout.name == "replicate, factors too":
        return 2 * 4 * (trained + root) * (processes - 1) / processes
    sent = 2 * 2 * trained + 4 * trained + (2 + 4) * root
    if layout in (SHARD, REPLICATE):
        sent += 4 * shape.layers * sum(rank * inner for _, inner in matrices)
        rounded = 0 if layout == REPLICATE else 8  # of rows, in entries
        rows = [(out, inner + rank) for out, inner in matrices]
        copies = sum(m * (-(-n // rounded) * rounded if rounded else n) for m, n in rows)
        sent += (2 * 2 if layout == SHARD else 2) * shape.layers * copies
    return sent * (processes - 1) / processes


COPIED = layouts(4, node=8)[-1]


@pytest.mark.parametrize("layout", layouts(4, node=8), ids=lambda layout: layout.name)
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_a_step_sends_what_each_parameter_needs(layout, processes):
    with pretended(processes):
        record = measure_traffic(Step(layout, EVEN, **SIZES))
    norms = 8 * 64  # of the gradients, when they are clipped
    assert abs(total(record["step"]) - by_hand(layout, EVEN, processes, 8)) <= norms
    if layout == SHARD:  # A, once; and what it takes to prune alike everywhere
        inner = EVEN.layers * sum(inner for _, inner in block_matrices(EVEN))
        expected = 4 * 8 * inner * (processes - 1) / processes
        assert total(record["restart"], "all-gather") == expected
    if layout == COPIED:
        assert record["restart"] == []


@pytest.mark.parametrize(
    ("name", "shard", "replicate", "copied"), [("1.3b", 0.75, 0.45, 0.2), ("130m", 0.95, 0.75, 0.6)]
)
def test_low_rank_steps_send_so_much_of_what_full_rank_sends(name, shard, replicate, copied):
    """At rank 128 and 4 processes; in 130m embeddings, trained whole, weigh more."""
    shape = preset(name, vocab_size=32_000)
    sent = {}
    for layout in layouts(4, node=8):
        with pretended(4):
            found = sent_at_depth(Step(layout, shape, rank=128, length=64), sent_in_step)
        sent[layout.name] = sum(s.bytes for s in found)
    full = sent[FULL.name]
    assert sent[SHARD.name] <= shard * full
    assert sent[REPLICATE.name] <= replicate * full
    assert sent[COPIED.name] <= copied * full


def test_a_collective_whose_bytes_are_not_known_is_refused():
    with pretended(2):
        tensors = [torch.zeros(2), torch.zeros(2)]
        with pytest.raises(NotImplementedError, match="c10d::gather_ is not in _KNOWN"):
            sent_by(lambda: dist.gather(tensors[0], tensors))

"""Estimated memory is the memory that real processes take."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from reference_trainer.bench.estimate.peaks import estimate_peak
from reference_trainer.bench.layouts import LAYOUTS, Step
from reference_trainer.bench.tracker import measure_peak
from reference_trainer.config import CHECKPOINTING
from reference_trainer.model.llama import LlamaShape
from tests.distributed.processes import on_processes

SHAPE = LlamaShape(96, 250, 3, 4, 4, 500)  # 3 processes have uneven shards of it
RANK, LENGTH, SEQUENCES = 7, 48, 4
CASES = {
    2: list(product(LAYOUTS[:2], ("none",), ("fp32", "pure-bf16"))),
    3: list(product(LAYOUTS, CHECKPOINTING, ("bf16",))),
}
STEPS = {
    processes: [
        Step(layout, SHAPE, RANK, LENGTH, SEQUENCES, recompute, precision)
        for layout, recompute, precision in cases
    ]
    for processes, cases in CASES.items()
}
STEPS[2] += [
    Step(layout, SHAPE, RANK, LENGTH, SEQUENCES, precision=precision, accumulates=True, reduce=when)
    for layout, precision, when in (
        (LAYOUTS[0], "bf16", "step"),
        (LAYOUTS[0], "bf16", "micro-step"),
        (LAYOUTS[0], "fp32", "step"),
        (LAYOUTS[1], "bf16", "step"),
        (LAYOUTS[1], "pure-bf16", "step"),
        (LAYOUTS[2], "bf16", "micro-step"),
    )
]


def measured(rank, world_size):
    return {"peaks": torch.tensor([measure_peak(step) for step in STEPS[world_size]])}


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_peak_of_real_processes_is_within_five_percent(tmp_path, processes):
    ranks = on_processes(measured, processes, tmp_path / "ranks")
    found = torch.stack([rank["peaks"] for rank in ranks]).amax(0).tolist()
    for step, peak in zip(STEPS[processes], found, strict=True):
        expected = estimate_peak(replace(step, sequences=1), processes=processes)
        assert expected.at(SEQUENCES) / peak == pytest.approx(1, abs=0.05), step

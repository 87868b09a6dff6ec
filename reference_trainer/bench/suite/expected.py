"""The job beside the stages: on CPUs, the roofline of blocks and steps, and peaks of steps."""

import torch

from reference_trainer.bench.ceilings import Ceilings
from reference_trainer.bench.computation import computation
from reference_trainer.bench.estimate.depth import track_at_depth
from reference_trainer.bench.suite import blocks, steps
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes
from reference_trainer.bench.whole_step import block_kernels


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Write the expected time of each block and step, and the expected peak of each step."""
    ceilings = sizes.ceilings
    for micro in sizes.micros:
        for arm, layout in blocks.ARMS.items():
            if ceilings:
                kernels = block_kernels(arm, sizes.step(layout, micro))
                seconds = sum(map(ceilings.seconds, kernels))
                report.write("expected", what=blocks.named(arm, micro, True), value=seconds)
        for arm in steps.LAYOUTS:
            _expect_step(report, sizes, arm, micro, ceilings)


def _expect_step(
    report: Report, sizes: Sizes, arm: str, micro: int, ceilings: Ceilings | None
) -> None:
    step, name = sizes.step(steps.LAYOUTS[arm], micro), steps.named(arm, micro)
    if ceilings:
        taken = computation(step, processes=1, gpus={"here": ceilings})["here"][0]
        report.write("expected", what=name, value=taken)
    peak = float(track_at_depth(step, processes=1).totals.max())
    report.write("expected", what=f"{name}: peak", value=peak)

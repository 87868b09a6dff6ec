"""Stage 9: a restart, compared with a full-rank optimizer step, and exact pruning."""

import statistics

import torch

from reference_trainer.bench.restarts import measure_prune, measure_restart
from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes

_BLOCKS = 4


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Time a restart of a few blocks, and pruning."""
    options = {"blocks": min(_BLOCKS, sizes.shape.layers), "rank": sizes.rank}
    restarts = measure_restart(sizes.shape, device, repeats=sizes.repeats, **options)
    pruned = measure_prune(device, entries=sizes.entries, repeats=sizes.repeats)
    for records in (restarts, pruned):
        for record in records:
            name = f"{record['subject']}: {record['arm']}"
            baseline = f"{records[0]['subject']}: {records[0]['arm']}"
            middle = statistics.median(record["step_seconds"])
            report.measured(name, middle, baseline=baseline)

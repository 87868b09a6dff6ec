"""The peak of a training step with any number of sequences, from two tracks of it."""

import gc
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from reference_trainer.bench.estimate.depth import Deep, track_at_depth
from reference_trainer.bench.layouts import Step


@dataclass(frozen=True)
class Peak:
    r"""The peak of a step: $\max_t \alpha_t + n \beta_t$ bytes, $n$ sequences at once.

    After each operation $t$ the memory is linear in n; which one is the largest depends on n. With
    few it is where gradients are reduced or weights updated, with many where all is kept that
    backward needs.

    Args:
        step: of one sequence.
        weights: bytes of all parameters.
        optimizer: bytes of the optimizer's moments.
        fixed: alpha of each operation.
        each: beta of each operation.
    """

    step: Step
    weights: float
    optimizer: float
    fixed: NDArray[np.float64]
    each: NDArray[np.float64]

    def at(self, sequences: int) -> float:
        """Return the peak in bytes."""
        return float((self.fixed + sequences * self.each).max())

    def most(self, room: float) -> int:
        """Return how many sequences fit into so many bytes; 0 for none."""
        grows = self.each > 0
        if self.at(0) > room:
            return 0
        return int(((room - self.fixed[grows]) / self.each[grows]).min())


def estimate_peak(step: Step, *, processes: int, moments: float = 1.0) -> Peak:
    """Return the peak of a step.

    Args:
        step: which; of one sequence.
        processes: how many.
        moments: bytes of the optimizer's moments, as a share of AdamW's.
    """

    def tracked(sequences: int) -> Deep:
        gc.collect()  # the last one's tensors and hooks, which refer to each other
        return track_at_depth(replace(step, sequences=sequences), processes=processes)

    two, three = tracked(2), tracked(3)  # of a single one, flattened ids are no copy
    first, second = two.totals, three.totals
    saved = (1 - moments) * two.optimizer
    return Peak(
        step,
        two.weights,
        two.optimizer - saved,
        3 * first - 2 * second - saved,
        second - first,
    )

"""The peak memory of a step for any number of sequences, extrapolated from two and three."""

import gc
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from reference_trainer.bench.estimate.depth import Deep, track_at_depth
from reference_trainer.bench.layouts import Step


@dataclass(frozen=True)
class Peak:
    r"""The peak of a step with n sequences at once: $\max_t (\alpha_t + n \beta_t)$ bytes.

    The memory after each operation $t$ is linear in n. The operation of the peak depends on n: with
    few sequences it reduces gradients or updates weights; with many it is where autograd keeps the
    most for backward.

    Args:
        step: training step of one sequence.
        weights: bytes of all parameters.
        optimizer: bytes of the optimizer's moments.
        fixed: $\alpha_t$ of each operation.
        each: $\beta_t$ of each operation.
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
        """Return the largest number of sequences that fit into `room` bytes; 0 for none."""
        grows = self.each > 0
        if self.at(0) > room:
            return 0
        return int(((room - self.fixed[grows]) / self.each[grows]).min())


def estimate_peak(step: Step, *, processes: int, moments: float = 1.0) -> Peak:
    """Return the peak of a step.

    Args:
        step: training step of one sequence.
        processes: number of processes.
        moments: size of the optimizer's moments as a ratio to AdamW's.
    """

    def tracked(sequences: int) -> Deep:
        gc.collect()  # frees reference cycles of tensors and hooks
        return track_at_depth(replace(step, sequences=sequences), processes=processes)

    two, three = tracked(2), tracked(3)  # with one sequence, flattening ids copies nothing
    first, second = two.totals, three.totals
    saved = (1 - moments) * two.optimizer
    return Peak(
        step,
        two.weights,
        two.optimizer - saved,
        3 * first - 2 * second - saved,
        second - first,
    )

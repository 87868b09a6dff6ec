"""The memory of a model of any depth, extrapolated from three and four blocks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reference_trainer.bench.layouts import Step
from reference_trainer.bench.tracker import Tracked, track

FEW, MORE = 3, 4  # a first block, a last one, and at least one with a block on either side


@dataclass(frozen=True)
class Deep:
    """The memory of a process's tensors in a step, in bytes.

    Args:
        weights: bytes of all parameters.
        optimizer: bytes of AdamW's moments.
        totals: bytes of all tensors after each operation, without the blocks between the first two
            and the last two. Memory is linear from block to block there, so the peak is elsewhere.
    """

    weights: float
    optimizer: float
    totals: NDArray[np.float64]


def track_at_depth(step: Step, *, processes: int) -> Deep:
    r"""Return the memory of a training step: $m_L = m_3 + (L - 3) (m_4 - m_3)$ at each operation.

    The result equals that of `track` on all L blocks, because each further block adds the same.

    Args:
        step: training step to track; L is `step.shape.layers`.
        processes: number of processes.
    """
    layers = step.shape.layers
    if layers <= MORE:
        found = track(step, processes=processes)
        return Deep(found.weights, found.optimizer, np.concatenate(found.parts).astype(np.float64))
    few, more = (
        _ends(track(step.of_blocks(blocks), processes=processes)) for blocks in (FEW, MORE)
    )
    weights, optimizer, *totals = few + (layers - FEW) * (more - few)
    return Deep(weights, optimizer, np.array(totals))


def _ends(found: Tracked) -> NDArray[np.float64]:
    """Return the weights, the moments, and the totals of the first and last two blocks."""
    before, *blocks, after = found.parts
    forward, backward = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
    ends = (*forward[:2], *forward[-2:], *backward[:2], *backward[-2:])
    # The number of operations before the first block depends on the depth: keep their maximum.
    head = [found.weights, found.optimizer, max(before)]
    return np.concatenate([head, *ends, after]).astype(np.float64)

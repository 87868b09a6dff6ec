"""A model of three blocks and one of four tell what any number of them takes and sends."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from reference_trainer.bench.communication import Sent, sent_in_step
from reference_trainer.bench.layouts import Step
from reference_trainer.bench.tracker import Tracked, track

FEW, MORE = 3, 4  # a first block, a last one, and at least one with a block on either side


@dataclass(frozen=True)
class Deep:
    """What a process's tensors take in a step, in bytes.

    Args:
        weights: all parameters.
        optimizer: AdamW's moments.
        totals: all tensors, after each operation but those of the blocks between the first two and
            the last two: memory is linear from block to block there, so that none is the largest.
    """

    weights: float
    optimizer: float
    totals: NDArray[np.float64]


def track_at_depth(step: Step, *, processes: int) -> Deep:
    r"""Return the memory of a training step: $m_L = m_3 + (L - 3) (m_4 - m_3)$ at each operation.

    It is what `track` finds in all L blocks: each adds the same.

    Args:
        step: which; L is its shape's `layers`.
        processes: how many.
    """
    layers = step.shape.layers
    if layers <= MORE:
        found = track(step, processes=processes)
        return Deep(found.weights, found.optimizer, np.concatenate(found.parts).astype(np.float64))
    few, more = (_ends(track(_of(step, blocks), processes=processes)) for blocks in (FEW, MORE))
    weights, optimizer, *totals = few + (layers - FEW) * (more - few)
    return Deep(weights, optimizer, np.array(totals))


def sent_at_depth(step: Step, *, micro_steps: int = 1) -> list[Sent]:
    """Return what `sent_in_step` does, from as few blocks.

    Args:
        step: which; in the process group that there is.
        micro_steps: of it.
    """
    layers = step.shape.layers
    if layers <= MORE:
        return sent_in_step(step, micro_steps=micro_steps)
    few, more = (
        {sent.kind: sent for sent in sent_in_step(one, micro_steps=micro_steps)}
        for one in (_of(step, FEW), _of(step, MORE))
    )
    further = layers - MORE
    return [
        replace(
            sent,
            calls=sent.calls + further * (sent.calls - few[kind].calls),
            bytes=sent.bytes + further * (sent.bytes - few[kind].bytes),
        )
        for kind, sent in more.items()
    ]


def _of(step: Step, blocks: int) -> Step:
    return replace(step, shape=replace(step.shape, layers=blocks))


def _ends(found: Tracked) -> NDArray[np.float64]:
    """Return the weights, the moments, and the totals of the first and last two blocks."""
    before, *blocks, after = found.parts
    forward, backward = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
    ends = (*forward[:2], *forward[-2:], *backward[:2], *backward[-2:])
    # How many operations come before the first block depends on the blocks: their largest one.
    head = [found.weights, found.optimizer, max(before)]
    return np.concatenate([head, *ends, after]).astype(np.float64)

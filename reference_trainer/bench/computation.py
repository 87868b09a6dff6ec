"""The time of a step's computation on a GPU, extrapolated from few blocks and micro-steps."""

from collections.abc import Iterable, Sequence

from reference_trainer.bench.ceilings import Ceilings
from reference_trainer.bench.kernels import Kernel
from reference_trainer.bench.layouts import Step
from reference_trainer.bench.whole_step import around_blocks, block_kernels

_FEW, _MORE = 3, 4  # blocks; each further block adds the same time


def computation(
    step: Step, *, processes: int, gpus: dict[str, Ceilings]
) -> dict[str, tuple[float, float, float]]:
    """Return for each GPU the seconds of a step of one, two and three micro-steps.

    Every kernel runs at its ceiling, as in `bench roofline`, and blocks and loss are compiled; a
    real GPU takes at least as long. Each further micro-step adds as much as the third, and each
    further block adds the same.

    Args:
        step: training step with the sequences of one micro-step.
        processes: number of processes over which the model is laid out.
        gpus: ceilings by GPU name.
    """
    arm, layers = "ours" if step.layout.low_rank else "full", step.shape.layers
    block = block_kernels(arm, step)
    around = {
        (blocks, micro_steps): [
            kernel
            for part in around_blocks(
                step.of_blocks(blocks),
                processes=processes,
                micro_steps=micro_steps,
            )
            for kernel in part.kernels
        ]
        for blocks in (_FEW, _MORE)
        for micro_steps in (1, 2, 3)
    }

    def taken(micro_steps: int, ceilings: Ceilings) -> float:
        few, more = (_seconds(around[blocks, micro_steps], ceilings) for blocks in (_FEW, _MORE))
        blocks = layers * micro_steps * _seconds(block, ceilings)
        return few + (layers - _FEW) * (more - few) + blocks

    return {
        name: (taken(1, ceilings), taken(2, ceilings), taken(3, ceilings))
        for name, ceilings in gpus.items()
    }


def of_micro_steps(taken: Sequence[float], micro_steps: int) -> float:
    """Return the seconds of a step of `micro_steps` micro-steps, from the result of `computation`.

    Examples:
        >>> of_micro_steps((3.0, 5.0, 6.0), 5)
        8.0
    """
    if micro_steps <= len(taken):
        return taken[micro_steps - 1]
    return taken[-1] + (micro_steps - len(taken)) * (taken[-1] - taken[-2])


def _seconds(kernels: Iterable[Kernel], ceilings: Ceilings) -> float:
    return sum(map(ceilings.seconds, kernels))

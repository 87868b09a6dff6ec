"""How long a training step computes on a GPU at its ceilings, from few blocks and micro-steps."""

from collections.abc import Iterable
from dataclasses import replace

from reference_trainer.bench.ceilings import Ceilings
from reference_trainer.bench.kernels import Kernel
from reference_trainer.bench.layouts import Step
from reference_trainer.bench.whole_step import around_blocks, block_kernels

_FEW, _MORE = 3, 4  # blocks: each further one adds the same


def computation(
    step: Step, *, processes: int, gpus: dict[str, Ceilings]
) -> dict[str, tuple[float, float]]:
    r"""Return for each GPU the seconds $a$ and $b$ of a step of $m$ micro-steps, $a + m b$.

    It is what kernels take at the ceilings, `bench roofline`'s, blocks and loss compiled: at least
    what a GPU takes. With L blocks, both are linear in L.

    Args:
        step: of one micro-step's sequences.
        processes: over how many it is laid.
        gpus: their ceilings by name.
    """
    arm = "ours" if step.layout.low_rank else "full"
    block = block_kernels(arm, step)
    around = {
        (blocks, micro_steps): [
            kernel
            for part in around_blocks(
                replace(step, shape=replace(step.shape, layers=blocks)),
                processes=processes,
                micro_steps=micro_steps,
            )
            for kernel in part.kernels
        ]
        for blocks in (_FEW, _MORE)
        for micro_steps in (1, 2)
    }
    found = {}
    for name, ceilings in gpus.items():
        taken = {size: _seconds(kernels, ceilings) for size, kernels in around.items()}
        each = {blocks: taken[blocks, 2] - taken[blocks, 1] for blocks in (_FEW, _MORE)}
        once = {blocks: taken[blocks, 1] - each[blocks] for blocks in (_FEW, _MORE)}
        layers = step.shape.layers
        found[name] = (
            _at_depth(once, layers),
            _at_depth(each, layers) + layers * _seconds(block, ceilings),
        )
    return found


def _at_depth(seconds: dict[int, float], layers: int) -> float:
    return seconds[_FEW] + (layers - _FEW) * (seconds[_MORE] - seconds[_FEW])


def _seconds(kernels: Iterable[Kernel], ceilings: Ceilings) -> float:
    return sum(map(ceilings.seconds, kernels))

"""The estimate of a phase in a layout: sequences that fit, bytes sent, and seconds of a step."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from reference_trainer.bench import results
from reference_trainer.bench.ceilings import CEILINGS
from reference_trainer.bench.communication import difference, sent_at_depth, sent_in_step
from reference_trainer.bench.computation import computation, of_micro_steps
from reference_trainer.bench.estimate.peaks import Peak, estimate_peak
from reference_trainer.bench.layouts import BF16, FULL, REPLICATE, SHARD, Step, pretended
from reference_trainer.bench.projection import Cluster, communication_seconds
from reference_trainer.config import Checkpointing

PHASES = {
    FULL: "warm start",
    SHARD: "ReLoRA, shard",
    REPLICATE: "ReLoRA, replicate",
    BF16: "ReLoRA, replicate, base bf16",
}


@dataclass(frozen=True)
class Row:
    """The estimate of a phase in a layout.

    Args:
        phase: name in tables.
        layout: "shard" or "replicate".
        base: `relora.base`.
        recompute: `parallel.checkpoint_activations`.
        weights: bytes of parameters on a GPU.
        optimizer: bytes of moments on a GPU.
        peak: peak in bytes with `micro` sequences at once, or with one if none fits.
        fits: number of sequences that fit at once.
        micro: largest number of sequences that fits and divides the GPU's sequences; 0 for none.
        reduce: `parallel.reduce`.
        sent: bytes that a GPU sends in a step.
        seconds: seconds of a step with all communication hidden and with none hidden; empty if no
            sequence fits.
        peaks: peaks in bytes with 1 to `micro` sequences at once.
    """

    phase: str
    layout: str
    base: str
    recompute: Checkpointing
    weights: float
    optimizer: float
    peak: float
    fits: int
    micro: int
    reduce: str
    sent: float
    seconds: tuple[float, ...]
    peaks: tuple[float, ...] = ()

    def peak_of(self, sequences: int) -> float:
        """Return the peak in bytes with `sequences` at once, at most `micro`."""
        return self.peaks[sequences - 1]


def row_of(
    step: Step, *, processes: int, moments: float, mine: int, room: float, cluster: Cluster
) -> Row:
    """Return the estimate of a step of `mine` sequences on each GPU, as many at once as fit.

    Gradients are reduced once per step, or in every micro-step if nothing fits otherwise.
    """

    def peak_of(**changed: Any) -> Peak:
        return estimate_peak(replace(step, **changed), processes=processes, moments=moments)

    peak = peak_of(accumulates=True)
    if peak.most(room) >= mine or not peak.most(room):
        alone = peak_of(accumulates=False)
        if alone.most(room) >= mine:
            peak = alone
        elif not peak.most(room):
            peak = peak_of(accumulates=True, reduce="micro-step")
    fits = peak.most(room)
    micro = max((n for n in range(1, min(fits, mine) + 1) if mine % n == 0), default=0)
    seconds: tuple[float, ...] = ()
    total = 0.0
    if micro:
        micro_steps = mine // micro
        counted = replace(step, recompute="none", reduce=peak.step.reduce)  # same traffic
        with pretended(processes):
            one, two = (
                sent_at_depth(counted, partial(sent_in_step, micro_steps=n)) for n in (1, 2)
            )
        once, further = ([asdict(sent) for sent in all] for all in (one, difference(two, one)))
        compute = _computed(replace(step, sequences=micro), processes, micro_steps, cluster)
        sent = communication_seconds(once, further, cluster, micro_steps=micro_steps)
        seconds = max(compute, sent), compute + sent
        total = results.total(once) + (micro_steps - 1) * results.total(further)
    return Row(
        PHASES[step.layout],
        step.layout.bases,
        step.layout.base,
        step.recompute,
        peak.weights,
        peak.optimizer,
        peak.at(micro or 1),
        fits,
        micro,
        peak.step.reduce,
        total,
        seconds,
        tuple(peak.at(count) for count in range(1, micro + 1)),
    )


def _computed(step: Step, processes: int, micro_steps: int, cluster: Cluster) -> float:
    gpus = {cluster.gpu: CEILINGS[cluster.gpu]}
    taken = computation(step, processes=processes, gpus=gpus)[cluster.gpu]
    return of_micro_steps(taken, micro_steps)

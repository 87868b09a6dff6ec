"""The phases of a run, the full-rank warm start and ReLoRA, with their clocks and the cosine."""

from dataclasses import dataclass

from reference_trainer.config import Config
from relora_core import JaggedCosine, Restarts


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one set of trainable parameters.

    Args:
        name: "warm-start" or "relora".
        start: its first step, counted over the whole run.
        stop: the step after its last.
        clock: the clock of the restarts, in steps of the phase; None without low-rank sites.
    """

    name: str
    start: int
    stop: int
    clock: Restarts | None

    @property
    def low_rank(self) -> bool:
        """Whether the targets are low-rank sites."""
        return self.clock is not None

    @property
    def cycles(self) -> int:
        """How many low-rank updates are summed from its start to its end."""
        return self.restarts(self.stop - 1) + 1 if self.low_rank else 0

    def restarts_at(self, step: int) -> bool:
        """Whether a restart runs before the run's `step`."""
        return self.clock is not None and self.clock.at(step - self.start)

    def restarts(self, step: int) -> int:
        """How many restarts have run when the run's `step` runs, one just before it included."""
        return self.clock.count(step - self.start) if self.clock is not None else 0


def phases(config: Config) -> list[Phase]:
    """Return the run's phases in order, without empty ones.

    Examples:
        >>> [(phase.name, phase.cycles) for phase in phases(Config())]
        [('warm-start', 0), ('relora', 5)]
    """
    warm = config.relora.warm_start
    clock = Restarts(every=config.relora.every, warmup=config.relora.warmup)
    both = [Phase("warm-start", 0, warm, None), Phase("relora", warm, config.steps, clock)]
    return [phase for phase in both if phase.start < phase.stop]


@dataclass(frozen=True)
class Envelope:
    """The run's cosine, with a warm-up at the start of a phase, as a function of the phase's step.

    Args:
        start: the phase's first step in the run.
        total: the number of steps in the run.
        warmup: the number of steps from 0 up to the cosine.
        min_ratio: the factor at the end of the cosine.
    """

    start: int
    total: int
    warmup: int
    min_ratio: float

    def __call__(self, step: int) -> float:
        """Return the factor at the phase's `step`."""
        ramp = min(1.0, step / self.warmup) if self.warmup else 1.0
        cosine = JaggedCosine(self.total, min_ratio=self.min_ratio)
        return ramp * cosine(self.start + step)

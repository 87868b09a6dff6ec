"""A trial: one arm, at one size, from one seed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from reference_trainer.model.llama import LlamaShape, preset

VOCAB = 256  # bytes
FULL, PLAIN, LORA, RELORA = "full rank", "LoRA", "LoRA + warm start", "ReLoRA + warm start"


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        name: as a table shows it.
        lr: the peak learning rate of everything but the factors.
        warm_start: the share of the steps before there are sites.
        rank: of every site after that; 0: it goes on in full rank.
        cycles: into how many the steps after the warm start are cut; 1: plain LoRA.
        lr_multiple: the factors' learning rate, times `lr`.
        prune_ratio: of the factors' moments at a restart; None: they are not reset.
        rewarm: the share of a cycle over which the learning rate rises again after a restart; 0:
            it does not fall (and rises only once, after the warm start).
    """

    name: str
    lr: float
    warm_start: float = 0.25
    rank: int = 0
    cycles: int = 1
    lr_multiple: float = 1.0
    prune_ratio: float | None = 0.99
    rewarm: float = 0.05


@dataclass(frozen=True)
class Trial:
    """An arm, at a size, from a seed.

    Args:
        model: a preset of the trainer's, with a vocabulary of bytes.
        arm: how it is trained.
        seed: of weights, factors and the order of the text.
        steps: of the optimizer.
        sequences: a step.
        length: tokens of each.
    """

    model: str
    arm: Arm
    seed: int
    steps: int
    sequences: int = 4
    length: int = 128

    @property
    def shape(self) -> LlamaShape:
        """The model's numbers."""
        return preset(self.model, vocab_size=VOCAB)

    @property
    def warm_steps(self) -> int:
        """Steps of full rank."""
        return round(self.arm.warm_start * self.steps)

    @property
    def period(self) -> int:
        """Steps from one restart to the next; the last cycle may be shorter."""
        return -(-(self.steps - self.warm_steps) // self.arm.cycles)

    def of_full_rank(self) -> "Trial":
        """Return the trial of full rank that this one begins as."""
        return replace(self, arm=Arm(FULL, self.arm.lr, self.arm.warm_start))

    def key(self) -> dict[str, Any]:
        """Return what tells this trial from another, as JSON values."""
        arm = asdict(self.arm)
        return {**asdict(self), "arm": arm.pop("name"), **arm}

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is this trial's."""
        return all(record[name] == value for name, value in self.key().items())

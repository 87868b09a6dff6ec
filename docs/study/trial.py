"""A trial: one arm, at one size, from one seed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reference_trainer.model.llama import LlamaShape, preset

VOCAB = 256  # bytes
FULL, PLAIN, LORA, RELORA = "full rank", "LoRA", "LoRA + warm start", "ReLoRA + warm start"


@dataclass(frozen=True)
class Arm:
    """A training method with its options.

    Args:
        name: name in tables.
        lr: peak learning rate of all parameters except the factors.
        warm_start: share of the steps that are trained at full rank, before there are sites.
        rank: rank of every site after the warm start; 0 to continue at full rank.
        cycles: number of cycles after the warm start; 1 is plain LoRA.
        lr_multiple: learning rate of the factors, as a multiple of `lr`.
        prune_ratio: prune ratio of the factors' moments at a restart; None for no reset.
        rewarm: length of the ramp after a restart, as a share of a cycle; 0 for no ramp, except
            after the warm start.
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
    """A training of one arm, at one model size, from one seed.

    Args:
        model: preset of the trainer; the vocabulary is bytes.
        arm: training method.
        seed: seed of the weights, the factors and the order of the text.
        steps: number of optimizer steps.
        sequences: number of sequences in a step.
        length: number of tokens in a sequence.
    """

    model: str
    arm: Arm
    seed: int
    steps: int
    sequences: int = 4
    length: int = 128

    @property
    def shape(self) -> LlamaShape:
        """The shape of the model."""
        return preset(self.model, vocab_size=VOCAB)

    @property
    def warm_steps(self) -> int:
        """The number of steps at full rank."""
        return round(self.arm.warm_start * self.steps)

    @property
    def period(self) -> int:
        """The number of steps in a cycle; the last cycle may be shorter."""
        return -(-(self.steps - self.warm_steps) // self.arm.cycles)

    def key(self) -> dict[str, Any]:
        """Return the values that identify this trial, as JSON values."""
        arm = asdict(self.arm)
        return {**asdict(self), "arm": arm.pop("name"), **arm}

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record belongs to this trial."""
        return all(record[name] == value for name, value in self.key().items())

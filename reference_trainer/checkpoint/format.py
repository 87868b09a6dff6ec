"""The files of a checkpoint, and what they say of a run.

checkpoints/step-00000200/
    shard-00001-of-00002.safetensors  every process's part of model and optimizer
    state.json                        step, phase, schedule, and what each tensor is
    manifest.json                     checksums; written last, so it marks completeness
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reference_trainer.checksums import read_json
from reference_trainer.errors import DamagedError

FORMAT, MANIFEST, STATE = 3, "manifest.json", "state.json"


_MODEL = "model."


@dataclass(frozen=True)
class Position:
    """The position of a run.

    Args:
        step: the next step to run.
        phase: the name of the phase that the checkpoint was written in.
        schedule: the scheduler's state.
        optimizer: for each parameter the keys and shapes of its optimizer state.
        fixed: values that the run was begun with and that may not change, by name.
    """

    step: int
    phase: str
    schedule: dict[str, Any]
    optimizer: dict[str, dict[str, list[int]]]
    fixed: dict[str, Any]


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint before `step` lies."""
    return checkpoints / f"step-{step:08d}"


def read_position(checkpoint: Path) -> Position:
    """Return the position at which a checkpoint was written.

    Raises:
        DamagedError: if its state.json is absent or damaged.
    """
    file = checkpoint / STATE
    try:
        return Position(**read_json(file))
    except TypeError as error:
        raise DamagedError(f"{file} is damaged ({error})") from None


def named(
    tensors: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Return the model's tensors and its optimizer's states under their names in a checkpoint."""
    everything: dict[str, Any] = {_MODEL + name: tensor for name, tensor in tensors.items()}
    for name, state in states.items():
        everything |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    return everything

"""Checkpoints that are complete or absent: found, checked and loaded; `saving.py` writes them.

checkpoints/step-00000200/
    shard-00001-of-00002.safetensors  every process's part of model and optimizer
    state.json                        step, phase, schedule, and what each tensor is
    manifest.json                     checksums; written last, so it marks completeness
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer

from reference_trainer.errors import DamagedError, UserError
from reference_trainer.sealed import read_json, read_sealed, verify
from reference_trainer.terminal import log
from reference_trainer.world import World

FORMAT, MANIFEST, STATE = 3, "manifest.json", "state.json"
_MODEL = "model."


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Args:
        step: the next step to run.
        phase: the name of the phase that the checkpoint was written in.
        schedule: the scheduler's state.
        optimizer: for each parameter the keys and shapes of its optimizer state.
        fixed: what the run was begun with and may not change, by name.
    """

    step: int
    phase: str
    schedule: dict[str, Any]
    optimizer: dict[str, dict[str, list[int]]]
    fixed: dict[str, Any]


def complete(directory: Path) -> list[Path]:
    """Return the checkpoints that have a manifest, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{MANIFEST}"))


def find(directory: Path, world: World) -> Path | None:
    """Return `newest_sound` of the first process on every one; damages become warnings.

    Raises:
        SharedError: if there are complete checkpoints and all are damaged.
    """

    def sound() -> tuple[str | None, list[str]]:
        newest, damages = newest_sound(directory)
        return str(newest) if newest else None, damages

    newest, damages = world.on_first(sound)
    if world.first:
        for damage in damages:
            goes_on = f"going on from {Path(newest).name}" if newest else "beginning again"
            log.warning(f"{damage}: {goes_on}")
    return Path(newest) if newest else None


def newest_sound(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint whose files are as they were written.

    Returns:
        It, or None if there is no complete one at all; and what is wrong with newer ones, a line
        for each: incomplete, as one that a crash cut short, or damaged.

    Raises:
        UserError: if there are complete ones, and each is damaged.
    """
    troubles, damaged = [], False
    for found in sorted(directory.glob("step-*"), reverse=True):
        if not (found / MANIFEST).exists():
            troubles.append(f"{found} is incomplete")
            continue
        try:
            check(found)
        except DamagedError as error:
            troubles.append(str(error))
            damaged = True
        else:
            return found, troubles
    if damaged:
        raise UserError("; ".join(troubles))
    return None, troubles


def check(checkpoint: Path) -> None:
    """Check that a complete checkpoint's files are as they were written.

    Raises:
        DamagedError: if a file is absent, damaged, of another version or not its own; it names it.
    """
    checksums = read_sealed(checkpoint / MANIFEST, format=FORMAT)["checksums"]
    verify(checkpoint, checksums)
    for file in checkpoint.glob("*.safetensors"):  # all of which are read
        if file.name not in checksums:
            raise DamagedError(f"{file} does not belong to its checkpoint")


def read_position(checkpoint: Path) -> Position:
    """Return where a checkpoint stands.

    Raises:
        DamagedError: if its state.json is absent or damaged.
    """
    file = checkpoint / STATE
    try:
        return Position(**read_json(file))
    except TypeError as error:
        raise DamagedError(f"{file} is damaged ({error})") from None


def load_(
    checkpoint: Path,
    position: Position,
    *,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    world: World,
) -> None:
    """Load into `tensors` and the optimizer's state in place, at any world size.

    Args:
        checkpoint: a complete one.
        position: what `read_position` returned for it.
        tensors: what to fill, by the names of the checkpoint; it may hold more.
        parameters: the trained parameters by name; those that the checkpoint has optimizer state
            for take it, the others start without.
        optimizer: theirs.
        world: the processes.
    """
    states: dict[str, dict[str, Tensor]] = {}
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    for name, parameter in parameters.items():
        scalar = torch.zeros((), device=parameter.device if on_device else "cpu")
        shapes = position.optimizer.get(name, {})
        states[name] = {
            key: torch.zeros_like(parameter, requires_grad=False) if shape else scalar.clone()
            for key, shape in shapes.items()
        }
    everything = named(tensors, states)
    reader = HuggingFaceStorageReader(str(checkpoint))
    dcp_load(everything, storage_reader=reader, no_dist=world.alone)
    for name, state in states.items():
        if state:
            optimizer.state[parameters[name]] = state


def named(
    tensors: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Return the model's tensors and its optimizer's states under their names in a checkpoint."""
    everything: dict[str, Any] = {_MODEL + name: tensor for name, tensor in tensors.items()}
    for name, state in states.items():
        everything |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    return everything

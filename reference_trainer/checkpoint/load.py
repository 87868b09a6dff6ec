"""A checkpoint's tensors loaded in place, at any world size."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer

from reference_trainer.checkpoint.format import Position, named
from reference_trainer.distributed import World


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

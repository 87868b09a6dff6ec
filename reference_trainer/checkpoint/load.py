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
    """Load a checkpoint into `tensors` and the optimizer's state, in place, at any world size.

    Args:
        checkpoint: a complete checkpoint.
        position: what `read_position` returned for it.
        tensors: the tensors to fill, by their names in the checkpoint, which may hold others, too.
        parameters: the trained parameters by name. A parameter without optimizer state in the
            checkpoint starts without state.
        optimizer: the optimizer of `parameters`.
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

"""The rank that the updates of a few matrices have reached since the low-rank phase began."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from reference_trainer.errors import UserError
from reference_trainer.sealed import read_sealed_tensors, write_sealed_tensors
from reference_trainer.world import World


def spread(names: list[str], count: int) -> list[str]:
    """Return up to `count` of `names`, evenly spread over their order.

    Example:
        >>> spread(["a", "b", "c", "d", "e"], 3)
        ['a', 'c', 'e']
    """
    if count >= len(names):
        return names
    if count == 1:
        return names[:1]
    return [names[index * (len(names) - 1) // (count - 1)] for index in range(count)]


class RankMeter:
    """Measures rank(W_k - W_0), W_0 kept in a file of the run's.

    Every process calls it alike; the first one computes.

    Args:
        file: of W_0.
        weights: the matrices to follow by name, sharded or not.
        world: the processes.
        begins: whether `weights` are W_0 now; otherwise the file is read.

    Raises:
        UserError: if the file is needed and absent or damaged.
    """

    def __init__(
        self, file: Path, weights: Mapping[str, Tensor], world: World, *, begins: bool
    ) -> None:
        self._device = world.device
        self._first: dict[str, Tensor] = {}
        if begins:
            whole = _whole(weights)
            if world.first:
                write_sealed_tensors(file, whole)
        elif not file.is_file():
            raise UserError(
                f"{file} is gone, against which ranks are measured: set log.rank_sites=0"
            )
        if world.first:
            self._first = read_sealed_tensors(file)

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Return each matrix's rank of W - W_0; empty on all processes but the first."""
        whole = _whole(weights)
        return {
            name: update_rank(whole[name].to(self._device), first.to(self._device))
            for name, first in self._first.items()
        }


def update_rank(now: Tensor, first: Tensor) -> int:
    """Return how many directions `now - first` has above what rounding can make.

    Every merge rounds each entry of W to fp32. Such noise has singular values of about
    eps * max|W| * sqrt(max(shape)), so a direction counts above ten times that, and above the
    usual eps * max(shape) * (largest singular value).

    Example:
        >>> first = torch.eye(8)
        >>> update_rank(first + torch.ones(8, 8), first)
        1
    """
    values = torch.linalg.svdvals(now.double() - first.double())
    eps = torch.finfo(torch.float32).eps
    noise = 10 * eps * now.abs().max().double() * max(now.shape) ** 0.5
    return int((values > torch.maximum(noise, eps * max(now.shape) * values[0])).sum())


@torch.no_grad()
def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {}
    for name, weight in weights.items():
        gathered = weight.full_tensor() if isinstance(weight, DTensor) else weight
        whole[name] = gathered.detach().cpu().clone()
    return whole

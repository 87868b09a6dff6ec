"""A short account of a model: its low-rank sites, and its Parameters trained at full rank."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora_core.distributed.local import local
from relora_core.distributed.sharding import shard_max
from relora_core.optim.pruning import to_floats
from relora_core.optim.stepped import passed_over
from relora_core.sites.site import clean_name, low_rank_sites, plain_name, unwrapped


@dataclass(frozen=True)
class Line:
    """One tensor of a summary.

    Args:
        shape: the shape of the tensor.
        rank: the rank of its site; None if it is trained at full rank.
    """

    shape: tuple[int, ...]
    rank: int | None = None

    @property
    def entries(self) -> int:
        """The number of entries of the tensor."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Summary:
    """The low-rank sites of a model and its Parameters trained at full rank; prints as a table.

    Args:
        sites: the sites, by name.
        whole: the Parameters trained at full rank, by qualified name.
        left: names of the Parameters in `whole` for which factors of the sites' lowest rank would
            have at most half as many entries.
        idle: names of idle sites: their B is still zero, although another site's B is not, or
            although the optimizer that holds them has stepped other parameters.

    Examples:
        >>> summary(nn.Linear(60, 40)).left
        ('weight',)
    """

    sites: dict[str, Line]
    whole: dict[str, Line]
    left: tuple[str, ...]
    idle: tuple[str, ...]

    def __str__(self) -> str:
        made = sum(line.entries for line in self.sites.values())
        trained = sum(line.entries for line in self.whole.values())
        rest = sum(self.whole[name].entries for name in self.left)
        lines = [
            f"{len(self.sites)} low-rank sites, {made:,} entries in W",
            f"{len(self.whole)} Parameters trained whole, {trained:,} entries, {rest:,} of them in "
            "large matrices",
        ]
        lines += _grouped(
            (name, f"{_shape(line)}, rank {line.rank}") for name, line in self.sites.items()
        )
        lines += _grouped((name, f"{_shape(self.whole[name])}, whole") for name in self.left)
        lines += _grouped((name, "B is zero: nothing has trained it") for name in self.idle)
        return "\n".join(lines)


def _grouped(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Iterate over lines, one for each group of entries whose names differ only in numbers."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, what in entries:
        alike.setdefault((re.sub(r"\d+", "*", name), what), []).append(name)
    for (pattern, what), names in alike.items():
        one = len(names) == 1
        yield f"  {names[0]}: {what}" if one else f"  {pattern} ({len(names)}): {what}"


def summary(model: nn.Module) -> Summary:
    """Return a model's sites, its Parameters trained at full rank, and which of these are large.

    Under FSDP2 every process must call it.

    Args:
        model: a model with or without sites.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 30))
        >>> print(summary(add_low_rank_(model, ["0"], rank=2)))
        1 low-rank sites, 2,400 entries in W
        3 Parameters trained whole, 1,270 entries, 1,200 of them in large matrices
          0: 40 x 60, rank 2
          1.weight: 30 x 40, whole
    """
    sites = list(low_rank_sites(model))
    parts = {id(p) for _, site in sites for p in site.low_rank.parameters()}
    whole = {
        plain_name(clean_name(name)): Line(tuple(p.shape))
        for name, p in unwrapped(model).named_parameters()
        if p.requires_grad and id(p) not in parts
    }
    rank = min((site.rank for _, site in sites), default=1)
    marks = to_floats([_is_trained(site.lora_B) for _, site in sites])
    trained = {
        name: mark > 0 or not site.is_trainable
        for (name, site), mark in zip(sites, marks, strict=True)
    }
    factors = [p for _, site in sites for p in (site.lora_A, site.lora_B)]
    named = any(trained.values()) or passed_over(factors)
    return Summary(
        sites={name: Line(tuple(site.weight.shape), site.rank) for name, site in sites},
        whole=whole,
        left=tuple(name for name, line in whole.items() if _would_halve(line.shape, rank)),
        idle=tuple(n for n, one in trained.items() if not one) if named else (),
    )


@torch.no_grad()
def _is_trained(B: nn.Parameter) -> Tensor:
    """Return 1 if an entry of B is not zero, on any process, else 0."""
    if B.is_meta:
        return torch.zeros(())
    return shard_max(local(B).any().float(), B)


def _would_halve(shape: tuple[int, ...], rank: int) -> bool:
    """Whether factors of this rank have at most half as many entries as the matrix or matrices."""
    if len(shape) < 2:
        return False
    as_one, as_bank = (shape[0], math.prod(shape[1:])), shape[-2:]
    return any(2 * rank * (m + n) <= m * n for m, n in (as_one, as_bank))


def _shape(line: Line) -> str:
    return " x ".join(map(str, line.shape))

"""Ranks and spectra of accumulated updates, in the form of a record."""

from collections.abc import Mapping

from reference_trainer.logging.records import Ranks
from relora_core import Spectrum


def spread(names: list[str], count: int) -> list[str]:
    """Return up to `count` of `names`, evenly spread over their order.

    Examples:
        >>> spread(["a", "b", "c", "d", "e"], 3)
        ['a', 'c', 'e']
    """
    if count >= len(names):
        return names
    if count == 1:
        return names[:1]
    return [names[index * (len(names) - 1) // (count - 1)] for index in range(count)]


def ranks_of(spectra: Mapping[str, Spectrum], most: int) -> Ranks:
    """Return each matrix's rank, effective rank and stable rank, and the bound on all of them.

    Args:
        spectra: the spectra, by the matrix's name.
        most: the sum of the ranks of the updates that were added.

    Examples:
        >>> import torch
        >>> known = ranks_of({"up": Spectrum.of(torch.eye(3))}, 4)
        >>> known["bound"], known["ranks"], known["effective_ranks"], known["stable_ranks"]
        (3, {'up': 3}, {'up': 3.0}, {'up': 3.0})
    """
    return {
        "bound": max((min(most, *s.shape) for s in spectra.values()), default=0),
        "ranks": {name: s.rank() for name, s in spectra.items()},
        "effective_ranks": {name: _short(s.effective_rank) for name, s in spectra.items()},
        "stable_ranks": {name: _short(s.stable_rank) for name, s in spectra.items()},
    }


def values_of(spectrum: Spectrum) -> list[float]:
    """Return the singular values above rounding error, to four digits."""
    return [_short(value) for value in spectrum.values[: spectrum.rank()].tolist()]


def _short(value: float) -> float:
    return float(f"{value:.4g}")

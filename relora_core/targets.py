"""Which modules become low-rank sites: chosen by glob, checked, and made."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from relora_core._sharding import is_fully_sharded
from relora_core.low_rank import check_low_rank
from relora_core.register import check_target, register_low_rank
from relora_core.sites import clean_name, unwrapped


def add_low_rank_(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    rank: int,
    alpha: float | None = None,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    dropout: float = 0.0,
    trainable_scale: bool = False,
) -> nn.Module:
    r"""Make the `weight` of every matching module a low-rank site, in place.

    Matching base weights are frozen; all that does not match (biases, norms, embeddings, the
    head) stays as trainable as it was. Order: build, this, activation checkpointing, compile,
    `fully_shard`, optimizer. Give it the whole model: draws are keyed by names in `model`, so that
    blocks that are given one by one, with the same names in each, would draw the same A.

    Args:
        model: the model to change. It may be on the meta device; after `to_empty` fill the plain
            weights through `base_state_dict(model)`, and the factors by `reset_parameters` of
            each site's `low_rank`.
        targets: globs over qualified module names (`fnmatch`: `*` spans dots). A module counts
            if it has a `weight` Parameter of two or more dimensions.
        rank: $r$.
        alpha: $s$ = `alpha / rank` with each site's own rank; `rank` if None.
        seed: of every draw, which is also keyed by the module's name and the restart.
        rank_pattern: `{glob: rank}` for sites of another rank; the first glob that matches counts.
        dropout: of the low-rank path's input while training, from 0 to below 1; for linear layers
            only. It keeps a mask and a copy of the input for backward at every site.
        trainable_scale: whether each site's $s$ is trained, from `alpha / rank` on. A restart
            merges with its value, and keeps it.

    Returns:
        `model`.

    Raises:
        ValueError: if a glob matches nothing, a weight is tied, parametrized, sharded or in
            DistributedDataParallel, or a rank exceeds min(out, in). Nothing is changed then.
        TypeError: if a weight is not floating point, or a rank or `seed` is no int.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> _ = add_low_rank_(model, ["0"], rank=2, alpha=4)
        >>> model[0].weight, type(model[2].weight).__name__
        (LazyWeight(shape=(4, 6), rank=2, dtype=torch.float32), 'Parameter')

    Reference: https://arxiv.org/abs/2307.05695, section 3: attention and MLP projections.
    """
    rank_pattern = dict(rank_pattern or {})
    if is_fully_sharded(model):
        raise ValueError("the model is sharded already: add low-rank sites before fully_shard")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel already, which would not reduce the factors' "
            "gradients: add low-rank sites before it"
        )

    inner = unwrapped(model)
    candidates = {
        clean_name(name): module
        for name, module in inner.named_modules()
        if name and (parametrize.is_parametrized(module, "weight") or _has_matrix(module))
    }
    having = "module that has a weight of two or more dimensions"
    chosen = {name: candidates[name] for name in matching(targets, candidates, having)}
    if rank_pattern:
        matching(rank_pattern, chosen, "module that targets match", option="rank_pattern")
    _check_ties(inner, chosen)

    ranks = {name: _rank_of(name, rank, rank_pattern) for name in chosen}
    for name, module in chosen.items():
        try:
            base = check_target(module, "weight")
            check_low_rank(base, rank=ranks[name], alpha=alpha, seed=seed, dropout=dropout)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    for name, module in chosen.items():
        register_low_rank(
            module,
            rank=ranks[name],
            alpha=alpha,
            seed=seed,
            name=name,
            dropout=dropout,
            trainable_scale=trainable_scale,
        )
    return model


def matching(
    globs: str | Iterable[str], names: Iterable[str], what: str, *, option: str = "targets"
) -> list[str]:
    """Return those of `names` that a glob matches, in their order.

    Args:
        globs: one or several.
        names: to choose from.
        what: each of them is, for the error.
        option: that holds the globs, for the error.

    Raises:
        ValueError: if there is no glob, or one that matches none.
    """
    globs, names = [globs] if isinstance(globs, str) else list(globs), list(names)
    if not globs:
        raise ValueError(f"{option} is empty: name at least one glob, such as '*.mlp.*'")
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{option}: {glob!r} matches no {what}; there are: {shown or 'none'}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    # A lazy module's weight has no shape yet: a candidate, so that it is refused by name.
    return weight is not None and (is_lazy(weight) or weight.ndim >= 2)


def _rank_of(name: str, rank: int, rank_pattern: Mapping[str, int]) -> int:
    matches = (value for glob, value in rank_pattern.items() if fnmatchcase(name, glob))
    return next(matches, rank)


def _check_ties(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(clean_name(name))
    for name, module in chosen.items():
        tied = owners.get(id(module._parameters.get("weight")), [])
        if len(tied) > 1:
            raise ValueError(
                f"{name}.weight is tied ({', '.join(tied)}): a merge would change every use of "
                "it; untie it, or leave it out of targets"
            )

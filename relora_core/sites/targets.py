"""The tensors of a model that become low-rank sites: chosen by glob, checked and registered."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from relora_core.distributed.fsdp import is_fully_sharded
from relora_core.low_rank.candidates import batch_dims_of, check_target
from relora_core.low_rank.parametrization import LowRank, check_low_rank
from relora_core.low_rank.register import (
    low_rank_and_base,
    low_rank_tensors,
    make_site_,
    remove_low_rank,
)
from relora_core.low_rank.ties import Owner, Owners, owned_by, refuse_ties
from relora_core.sites.globs import as_list, matching
from relora_core.sites.site import clean_name, refuse_unsupported, unwrapped

# Modules whose Parameters have numbers or keys for names.
_LISTS = (nn.ParameterList, nn.ParameterDict)


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
    batch_dims: int | None = None,
) -> nn.Module:
    r"""Make the `weight` of every matching module a low-rank site, in place.

    Matching base weights are frozen; all other parameters (biases, norms, embeddings, the head)
    stay trainable or frozen as they were. Order: build, this function, activation checkpointing,
    compile, `fully_shard`, optimizer. Pass the whole model: draws are keyed by names in `model`, so
    blocks that are passed one by one, with the same names in each, would draw the same A.

    Args:
        model: the model to change. It may be on the meta device; after `to_empty` fill the plain
            weights through `base_state_dict(model)`, and the factors by `reset_parameters` of
            each site's `low_rank`.
        targets: globs over qualified module names (`fnmatch`: `*` spans dots). They match modules
            whose `weight` is a Parameter of two or more dimensions; a glob may also name the
            weight: `*.mlp.*.weight`. A Parameter with another name is a target if a glob matches
            its qualified name and the glob's last part matches its own name:
            `*.self_attn.in_proj_weight`, `*.experts.*_proj`, but not `*.self_attn.*`. In a
            ParameterList or ParameterDict, matching the qualified name suffices. A module with
            several names is one site, under its first name.
        rank: $r$, the rank of each site's $B A$, from 1 to `min(out, in)`.
        alpha: the numerator of $s$ = `alpha / rank`, with each site's own rank; that rank if None.
        seed: the seed of every draw, which is also keyed by the site's name and restart number.
        rank_pattern: `{glob: rank}` for sites of another rank; the first matching glob applies.
        dropout: the dropout probability on the low-rank path's input while training, at least 0 and
            below 1; for linear layers only. Every site then keeps a mask and a copy of its input
            for backward.
        trainable_scale: whether each site's $s$ is trained, starting at `alpha / rank`. A restart
            merges with the current $s$ and keeps it.
        batch_dims: the number of leading batch dimensions of targets that have more than two
            dimensions and belong to no convolution: 1 for banks of experts. See
            `register_low_rank`.

    Returns:
        `model`.

    Raises:
        ValueError: if a glob matches nothing, a weight is tied, parametrized, sharded or in
            DistributedDataParallel, or a rank exceeds min(out, in); if a weight may be a bank and
            `batch_dims` is None. Nothing is changed then.
        TypeError: if a weight is not floating point, or a rank or `seed` is not an int.

    Warns:
        UserWarning: if more than half of the matrix entries that the globs cover stay at full
            rank, because they belong to Parameters that no glob names.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> _ = add_low_rank_(model, ["0"], rank=2, alpha=4)
        >>> model[0].weight, type(model[2].weight).__name__
        (LazyWeight(shape=(4, 6), rank=2, dtype=torch.float32), 'Parameter')

    Reference: https://arxiv.org/abs/2307.05695, section 3: attention and MLP projections.
    """
    rank_pattern = dict(rank_pattern or {})
    targets = as_list(targets, "targets")
    if is_fully_sharded(model):
        raise ValueError("the model is sharded already: add low-rank sites before fully_shard")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel already, which would not reduce the factors' "
            "gradients: add low-rank sites before it"
        )
    refuse_unsupported(model)

    inner = unwrapped(model)
    chosen = _chosen(inner, targets)
    if rank_pattern:
        matching(rank_pattern, chosen, "module that targets match", option="rank_pattern")
    _refuse_ties_within(inner, chosen)

    options: dict[str, dict[str, Any]] = {
        name: {
            "rank": _rank_of(name, rank, rank_pattern),
            "alpha": alpha,
            "seed": seed,
            "dropout": dropout,
        }
        for name in chosen
    }
    for name, owner in chosen.items():
        _complete_(options[name], name, owner, batch_dims)
    refuse_ties(chosen, kept=True)

    with ExitStack() as undo:  # either all sites are made, or none
        for name, (module, tensor_name) in chosen.items():
            more = {"name": name, "trainable_scale": trainable_scale}
            make_site_(module, tensor_name, **options[name], **more)
            undo.callback(remove_low_rank, module, tensor_name, merge=False)
        undo.pop_all()
    _warn_of_the_rest(inner, targets, chosen.values())
    return model


def _complete_(options: dict[str, Any], name: str, owner: Owner, batch_dims: int | None) -> None:
    """Add a site's `batch_dims` to its options; raise what making it would, with its name."""
    try:
        base = check_target(*owner)
        options["batch_dims"] = batch_dims_of(*owner, batch_dims)
        check_low_rank(base, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None


def _chosen(model: nn.Module, targets: list[str]) -> dict[str, Owner]:
    """Return the tensors that globs match, each under its first name in `model`."""
    weights, others = _weights(model), _others(model)
    whole = [name for name, owner in others.items() if _covered(targets, name, owner)]
    what = "module that has a weight of two or more dimensions"
    if whole:
        what += f", and its last part names no Parameter (as it must for {whole[0]!r})"

    if not (weights or others) and _has(model, "weight"):
        raise ValueError(
            f"the model itself is a {type(model).__name__}, so its weight has no module name for a "
            "glob to match: call register_low_rank(model) for it"
        )

    def matches(name: str, glob: str) -> bool:
        if name in weights:
            by_weight = _names(glob, "weight") and fnmatchcase(f"{name}.weight", glob)
            return by_weight or fnmatchcase(name, glob)
        module, tensor_name = others[name]
        named = isinstance(module, _LISTS) or _names(glob, tensor_name)
        return named and fnmatchcase(name, glob)

    found = set(matching(targets, [*weights, *others], what, matches=matches))
    first: dict[tuple[int, str], str] = {}
    chosen: dict[str, Owner] = {}
    for name, owner in (weights | others).items():
        key = (id(owner[0]), owner[1])
        first.setdefault(key, name)
        if name in found:
            chosen[first[key]] = owner
    return chosen


def _weights(model: nn.Module) -> dict[str, Owner]:
    """Return the `weight` of each module that has one, under every name of the module."""
    return {
        clean_name(name): (module, "weight")
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (parametrize.is_parametrized(module, "weight") or _has(module, "weight"))
    }


def _others(model: nn.Module) -> dict[str, Owner]:
    """Return the matrices among Parameters not named `weight`, under every qualified name."""
    return {
        f"{clean_name(name)}.{tensor_name}".lstrip("."): (module, tensor_name)
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, parametrize.ParametrizationList | LowRank)
        for tensor_name in module._parameters
        if tensor_name != "weight" and _has(module, tensor_name)
    }


def _has(module: nn.Module, tensor_name: str) -> bool:
    parameter = module._parameters.get(tensor_name)
    # A lazy module's weight has no shape yet. It is a candidate, so that the error names it.
    return parameter is not None and (is_lazy(parameter) or parameter.ndim >= 2)


def _names(glob: str, tensor_name: str) -> bool:
    """Whether a glob's last part matches this tensor's name and is more than wildcards."""
    last = glob.rpartition(".")[2]
    return bool(last.strip("*?")) and fnmatchcase(tensor_name, last)


def _covered(targets: list[str], name: str, owner: Owner) -> bool:
    """Whether a glob matches a trained Parameter's qualified name, or its module's."""
    parameter = owner[0]._parameters[owner[1]]
    names = (name, name.removesuffix(owner[1]).removesuffix("."))
    trained = parameter is not None and parameter.requires_grad
    return trained and any(fnmatchcase(one, glob) for one in names for glob in targets)


def _rank_of(name: str, rank: int, rank_pattern: Mapping[str, int]) -> int:
    matches = (value for glob, value in rank_pattern.items() if fnmatchcase(name, glob))
    return next(matches, rank)


def _refuse_ties_within(model: nn.Module, chosen: Mapping[str, Owner]) -> None:
    """Raise ValueError, with the names in `model`, if a chosen tensor has several owners."""
    owners = Owners(owned_by(model.modules()))
    for module, tensor_name in chosen.values():
        parameter = module._parameters.get(tensor_name)
        if parameter is None or is_lazy(parameter):
            continue
        tied = owners.of(parameter)
        if len(tied) > 1:
            names = {id(module): clean_name(name) for name, module in model.named_modules()}
            shown = [f"{names[id(owner)]}.{own}".lstrip(".") for owner, own in tied]
            path = f"{names[id(module)]}.{tensor_name}".lstrip(".")
            raise ValueError(
                f"{path} is tied ({', '.join(shown)}): a merge would change every use of it; untie "
                "it, or leave it out of targets"
            )


def _warn_of_the_rest(model: nn.Module, targets: list[str], chosen: Iterable[Owner]) -> None:
    """Warn if most entries that the globs cover belong to Parameters that no glob names."""
    rest = {name: owner for name, owner in _others(model).items() if _covered(targets, name, owner)}
    left = sum(_entries(owner) for owner in rest.values())
    made = sum(_entries(owner) for owner in chosen)
    if left > made:
        shown = ", ".join(list(rest)[:4]) + (", ..." if len(rest) > 4 else "")
        warnings.warn(
            f"{left / (left + made):.0%} of the entries that targets match stay at full rank: "
            f"{shown}. A Parameter that is not called weight must be named by a glob: add "
            f"'*.{next(iter(rest.values()))[1]}' (with batch_dims=1, if it is a bank of experts)",
            stacklevel=3,
        )


def _entries(owner: Owner) -> int:
    module, tensor_name = owner
    if tensor_name in low_rank_tensors(module):
        return low_rank_and_base(module, tensor_name)[1].numel()
    parameter = module._parameters[tensor_name]
    return 0 if parameter is None or is_lazy(parameter) else parameter.numel()

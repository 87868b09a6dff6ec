"""The low-rank sites of a whole model: choose, iterate, merge, redraw."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from relora_core._sharding import full, is_fully_sharded, reshard_, sharded_like
from relora_core.low_rank import LowRank, check_low_rank
from relora_core.register import (
    check_target,
    low_rank_and_base,
    low_rank_tensors,
    register_low_rank,
)
from relora_core.update import Update

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Site:
    """A low-rank tensor of a module.

    It holds no tensor: `fully_shard` and `to_empty` replace every Parameter, so each is looked up
    when it is asked for.

    Args:
        module: the module that owns the tensor.
        tensor_name: the tensor's name in it.
    """

    module: nn.Module
    tensor_name: str

    @property
    def low_rank(self) -> LowRank:
        """The parametrization: factors, rank, alpha, scale, seed and restart."""
        return low_rank_and_base(self.module, self.tensor_name)[0]

    @property
    def weight(self) -> nn.Parameter:
        """W, the frozen base."""
        return low_rank_and_base(self.module, self.tensor_name)[1]

    @property
    def lora_A(self) -> nn.Parameter:
        """A, `(rank, in)`."""
        return self.low_rank.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """B, `(out, rank)`."""
        return self.low_rank.lora_B

    @property
    def rank(self) -> int:
        """The rank r of B A."""
        return self.low_rank.rank

    @property
    def scale(self) -> float:
        """The scale s of B A; where it is trained, this waits for the device."""
        scale = self.low_rank.scale
        return scale if isinstance(scale, float) else full(scale).item()

    @property
    def restart(self) -> int:
        """The number of redraws so far."""
        return self.low_rank.restart

    def merged(self) -> Tensor:
        """Return W + s B A, detached."""
        return self.low_rank.merged(self.weight)

    def exact(self) -> Tensor:
        """Return W, detached and sharded as it is; of a split W its fp32 value, made anew."""
        return sharded_like(self.low_rank.exact(self.weight), self.weight)

    def set_exact_(self, value: Tensor) -> None:
        """Set this process's part of W; of a split W both halves."""
        self.low_rank.set_exact_(self.weight, value)

    def update(self) -> Update:
        """Return this process's part of s B A, gathering what it lacks of the factors."""
        return self.low_rank.update(self.weight)

    def merge_(self, update: Update | None = None) -> None:
        """W += s B A (which `update` holds, if it was asked for already), and B is zeroed."""
        self.low_rank.merge_into_(self.weight, update)

    def redraw_(self) -> None:
        """A takes its next draw, and B is zeroed."""
        self.low_rank.redraw_()


def clean_name(name: str) -> str:
    """Return a qualified name without what `torch.compile` and activation checkpointing add.

    Examples:
        >>> clean_name("layers.0._checkpoint_wrapped_module.mlp.weight")
        'layers.0.mlp.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside data parallelism and `torch.compile`."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


def low_rank_sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Iterate over (qualified name, site) in the order in which the modules were registered.

    The name is the owning module's, without wrappers; for a tensor other than `weight`, the
    tensor's name follows, so that names are unique.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
        >>> _ = add_low_rank_(model, ["*"], rank=2)
        >>> [(name, site.rank) for name, site in low_rank_sites(model)]
        [('0', 2), ('1', 2)]
    """
    for module_name, module in unwrapped(model).named_modules():
        for tensor_name in low_rank_tensors(module):
            site = Site(module, tensor_name)
            site.low_rank.see_sharding()
            path = module_name if tensor_name == "weight" else f"{module_name}.{tensor_name}"
            yield clean_name(path.removeprefix(".")), site


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
    `fully_shard`, optimizer.

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
        TypeError: if a weight is not floating point.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> _ = add_low_rank_(model, ["0"], rank=2, alpha=4)
        >>> model[0].weight, type(model[2].weight).__name__
        (LazyWeight(shape=(4, 6), rank=2, dtype=torch.float32), 'Parameter')

    Reference: https://arxiv.org/abs/2307.05695, section 3: attention and MLP projections.
    """
    globs = [targets] if isinstance(targets, str) else list(targets)
    rank_pattern = dict(rank_pattern or {})
    if not globs:
        raise ValueError("targets is empty: name at least one glob, such as '*.mlp.*'")
    if is_fully_sharded(model):
        raise ValueError("the model is sharded already: add low-rank sites before fully_shard")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel already, which would not reduce the factors' "
            "gradients: add low-rank sites before it"
        )

    model = unwrapped(model)
    candidates = {
        clean_name(name): module
        for name, module in model.named_modules()
        if name and (parametrize.is_parametrized(module, "weight") or _has_matrix(module))
    }
    chosen = {
        name: module
        for name, module in candidates.items()
        if any(fnmatchcase(name, glob) for glob in globs)
    }
    check_globs("target", globs, candidates)
    check_globs("rank_pattern", rank_pattern, chosen)
    _check_ties(model, chosen)

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


def merge_(model: nn.Module) -> None:
    r"""$W \leftarrow W + s B A$ and $B \leftarrow 0$ at every site: the function stays.

    Merging twice is merging once. Under FSDP2 the model is resharded first, A is gathered, W is
    not.

    Raises:
        ValueError: if `model` has no site.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = add_low_rank_(model, ["0"], rank=2)
        >>> merge_(model)

    Reference: https://arxiv.org/abs/2307.05695, equation 4.
    """
    for _, site in sites_of(model):
        site.merge_()


def reinit_(model: nn.Module) -> None:
    r"""Draw a new $A$ and set $B \leftarrow 0$ at every site.

    What B A holds is dropped: call `merge_` first to keep it. Each draw is keyed by the site's
    (seed, name, restart number), and the number goes up by one.

    Raises:
        ValueError: if `model` has no site.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = add_low_rank_(model, ["0"], rank=2)
        >>> reinit_(model)
        >>> [site.restart for _, site in low_rank_sites(model)]
        [1]
    """
    for _, site in sites_of(model):
        site.redraw_()


def sites_of(model: nn.Module) -> list[tuple[str, Site]]:
    """Return the sites, ready to be written to; raise ValueError if there is none."""
    reshard_(model)
    sites = list(low_rank_sites(model))
    if not sites:
        raise ValueError("the model has no low-rank site: call add_low_rank_ first")
    return sites


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    # A lazy module's weight has no shape yet: a candidate, so that it is refused by name.
    return weight is not None and (is_lazy(weight) or weight.ndim >= 2)


def _rank_of(name: str, rank: int, rank_pattern: Mapping[str, int]) -> int:
    matches = (value for glob, value in rank_pattern.items() if fnmatchcase(name, glob))
    return next(matches, rank)


def check_globs(kind: str, globs: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError if a glob matches no name."""
    known = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ValueError(
                f"{kind} {glob!r} matches no module that has a weight of two or more dimensions; "
                f"there are: {shown or 'none'}"
            )


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

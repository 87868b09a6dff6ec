"""The low-rank sites of a whole model: iterated, merged and redrawn."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from relora_core.distributed.fsdp import is_flat, reshard_
from relora_core.distributed.sharding import full, sharded_like
from relora_core.low_rank.parametrization import LowRank
from relora_core.low_rank.register import low_rank_and_base, low_rank_owner, low_rank_tensors
from relora_core.low_rank.ties import refuse_ties
from relora_core.products.delta import Delta

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Site:
    """A low-rank tensor of a module.

    A Site holds no tensor. `fully_shard` and `to_empty` replace every Parameter, so each access
    looks the Parameter up again.

    Args:
        module: the module that owns the tensor.
        tensor_name: the tensor's name in `module`.
    """

    module: nn.Module
    tensor_name: str

    @property
    def low_rank(self) -> LowRank:
        """The parametrization: factors, rank, alpha, scale, seed and restart number."""
        return low_rank_and_base(self.module, self.tensor_name)[0]

    @property
    def weight(self) -> nn.Parameter:
        """W, the frozen base."""
        return low_rank_and_base(self.module, self.tensor_name)[1]

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """The module that holds W (torch's ParametrizationList), and W's name in it."""
        return low_rank_owner(self.module, self.tensor_name), "original"

    @property
    def lora_A(self) -> nn.Parameter:
        """A, `(rank, in)`; of a bank, `(E, rank, in)`."""
        return self.low_rank.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """B, `(out, rank)`; of a bank, `(E, out, rank)`."""
        return self.low_rank.lora_B

    @property
    def is_trainable(self) -> bool:
        """Whether A or B requires a gradient."""
        return self.lora_A.requires_grad or self.lora_B.requires_grad

    @property
    def rank(self) -> int:
        """The rank r of B A."""
        return self.low_rank.rank

    @property
    def scale(self) -> float:
        """The scale s of B A; reading a trained scale waits for the device."""
        scale = self.low_rank.scale
        return scale if isinstance(scale, float) else full(scale).item()

    @property
    def restart(self) -> int:
        """The number of redraws so far."""
        return self.low_rank.restart

    def merged(self) -> Tensor:
        """Return W + s B A, detached."""
        return self.low_rank._merged(self.weight)

    def exact(self) -> Tensor:
        """Return W, detached and with its sharding; for a split W, its fp32 value as a copy."""
        return sharded_like(self.low_rank._exact(self.weight), self.weight)

    def set_exact_(self, value: Tensor) -> None:
        """Set this process's part of W; for a split W, both halves."""
        self.low_rank._set_exact_(self.weight, value)
        self.refresh_()

    def _delta(self) -> Delta:
        """Return this process's shard of s B A, gathering the shards of A and B that it needs."""
        return self.low_rank._delta(self.weight)

    def merge_(self, update: Delta | None = None) -> None:
        """Add s B A to W and zero B; `update` is s B A, if it has been computed already."""
        self.low_rank._merge_into_(self.weight, update)
        self.low_rank._refresh_(self.weight, zero=True)

    def redraw_(self) -> None:
        """Set A to its next draw and B to zero."""
        self.low_rank.redraw_()
        self.low_rank._refresh_(self.weight, zero=True)

    def refresh_(self) -> None:
        """Rebuild the merged copy, if there is one: see `keep_merged_`."""
        self.low_rank._refresh_(self.weight)


def clean_name(name: str) -> str:
    """Return a qualified name without what `torch.compile` and activation checkpointing add.

    Examples:
        >>> clean_name("layers.0._checkpoint_wrapped_module.mlp.weight")
        'layers.0.mlp.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_name(name: str) -> str:
    """Return the name that W had before it was parametrized; any other name unchanged.

    Examples:
        >>> plain_name("layers.0.parametrizations.weight.original")
        'layers.0.weight'
    """
    prefix, found, tensor_name = name.removesuffix(".original").rpartition("parametrizations.")
    whole = found and name.endswith(".original") and "." not in tensor_name
    return prefix + tensor_name if whole else name


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside data parallelism, `torch.compile` and an AveragedModel."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, DistributedDataParallel | nn.DataParallel | AveragedModel):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


def refuse_unsupported(model: nn.Module) -> None:
    """Raise ValueError if `model` is wrapped by FSDP1, which flattens its parameters."""
    if is_flat(model):
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) flattens all parameters into one, so low-rank sites "
            "can be neither merged nor exported: use fully_shard (FSDP2), after add_low_rank_"
        )


def low_rank_sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Iterate over (qualified name, site) in the order in which the modules were registered.

    The name is the owning module's, without wrappers; for a tensor other than `weight`, the
    tensor's name follows, so that names are unique.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
        >>> _ = add_low_rank_(model, ["*"], rank=2)
        >>> [(name, site.rank) for name, site in low_rank_sites(model)]
        [('0', 2), ('1', 2)]
    """
    for module_name, module in unwrapped(model).named_modules():
        for tensor_name in low_rank_tensors(module):
            site = Site(module, tensor_name)
            path = module_name if tensor_name == "weight" else f"{module_name}.{tensor_name}"
            yield clean_name(path.removeprefix(".")), site


def merge_(model: nn.Module) -> nn.Module:
    r"""Merge every site: $W \leftarrow W + s B A$ and $B \leftarrow 0$, which keeps the function.

    A second merge changes nothing. Under FSDP2 the model is resharded first; A is gathered, W is
    not.

    Returns:
        `model`.

    Raises:
        ValueError: if `model` has no site, or a W is tied.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = add_low_rank_(model, ["0"], rank=2)
        >>> _ = merge_(model)

    Reference: https://arxiv.org/abs/2307.05695, equation 4.
    """
    sites = sites_of(model)
    refuse_ties({f"{name}.{site.tensor_name}": site.owner for name, site in sites})
    for _, site in sites:
        site.merge_()
    return model


def reinit_(model: nn.Module) -> nn.Module:
    r"""Draw a new $A$ and set $B \leftarrow 0$ at every site.

    The current update is dropped; call `merge_` first to keep it. Each draw is keyed by the site's
    (seed, name, restart number), and the restart number goes up by one.

    Returns:
        `model`.

    Raises:
        ValueError: if `model` has no site, or a restart was interrupted.

    Examples:
        >>> from relora_core import add_low_rank_
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = add_low_rank_(model, ["0"], rank=2)
        >>> _ = reinit_(model)
        >>> [site.restart for _, site in low_rank_sites(model)]
        [1]
    """
    sites = sites_of(model)
    refuse_under_way(sites)
    for _, site in sites:
        site.redraw_()
    return model


def sites_of(model: nn.Module) -> list[tuple[str, Site]]:
    """Return the sites, ready to be written to; raise ValueError if there is none."""
    refuse_unsupported(model)
    reshard_(model)
    sites = list(low_rank_sites(model))
    if not sites:
        raise ValueError("the model has no low-rank site: call add_low_rank_ first")
    refuse_torn(sites)
    for name, site in sites:
        site.low_rank.name = site.low_rank.name or name  # unnamed sites would all draw the same A
    return sites


def refuse_torn(sites: Iterable[tuple[str, Site]]) -> None:
    """Raise ValueError if a merge was interrupted after its first write."""
    for name, site in sites:
        site.low_rank._refuse_torn(name)


def refuse_under_way(sites: Iterable[tuple[str, Site]]) -> None:
    """Raise ValueError if an interrupted restart must be finished first."""
    for name, site in sites:
        if site.low_rank.restarting is not None:
            raise ValueError(
                f"a restart was interrupted at {name or 'the site'}: call restart_ again, which "
                "finishes it"
            )

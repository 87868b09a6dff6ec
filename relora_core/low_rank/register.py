"""One low-rank site: a tensor computed as W + s B A with W frozen, registered and removed."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import parametrize

from relora_core.low_rank.candidates import batch_dims_of, check_target
from relora_core.low_rank.parametrization import LowRank
from relora_core.low_rank.shared_class import own_class_, share_class_
from relora_core.low_rank.ties import refuse_ties


def register_low_rank(
    module: nn.Module,
    tensor_name: str = "weight",
    *,
    rank: int,
    alpha: float | None = None,
    seed: int = 0,
    name: str = "",
    dropout: float = 0.0,
    trainable_scale: bool = False,
    batch_dims: int | None = None,
) -> nn.Module:
    r"""Parametrize `module.<tensor_name>` as $W + s B A$ and freeze $W$.

    Linear layers, embeddings and other products with the tensor then compute two paths, which
    form neither the sum nor $W$'s gradient. Every other operation receives the materialized sum.
    The Parameter object itself moves to `module.parametrizations.<tensor_name>.original`, and its
    gradient is dropped. Call this before `fully_shard` and before building the optimizer.

    Args:
        module: the module to change in place.
        tensor_name: the name of the Parameter to parametrize; it has two or more dimensions.
        rank: $r$, the rank of $B A$, from 1 to `min(out, in)`.
        alpha: the numerator of $s$ = `alpha / rank`; `rank` if None.
        seed: the seed of every draw of $A$.
        name: distinguishes this site's draws from those of other sites with the same seed. If it
            is empty, the first `restart_`, `reinit_` or `merge_` of a model sets it to the site's
            name in that model.
        dropout: the dropout probability on the low-rank path's input while training; only for
            tensors that `F.linear` alone uses.
        trainable_scale: whether $s$ is trained, starting at `alpha / rank`.
        batch_dims: the number of leading batch dimensions: 1 for a bank of experts `(E, out, in)`,
            each with its own A and B, `(E, rank, in)` and `(E, out, rank)`; 0 for one matrix, where
            `in` is the product of all dimensions but the first. None means 0 for a matrix, a
            convolution or nn.Bilinear; any other tensor needs a number.

    Returns:
        `module`.

    Raises:
        ValueError: if the tensor is absent, tied, expanded, already parametrized or sharded, or has
            hooks; if it may be a bank and `batch_dims` is None; if an argument is out of range.
            Nothing is changed then.
        TypeError: if the tensor is not a float of 16, 32 or 64 bits; if it is packed, quantized,
            sparse or offloaded; if `rank` or `seed` is not an int.

    Examples:
        >>> layer = register_low_rank(nn.Linear(6, 4), rank=2)
        >>> layer.weight
        LazyWeight(shape=(4, 6), rank=2, dtype=torch.float32)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['bias', 'parametrizations.weight.0.lora_A', 'parametrizations.weight.0.lora_B']
    """
    check_target(module, tensor_name)
    refuse_ties({name or tensor_name: (module, tensor_name)}, kept=True)
    return make_site_(
        module,
        tensor_name,
        rank=rank,
        alpha=alpha,
        seed=seed,
        name=name,
        dropout=dropout,
        trainable_scale=trainable_scale,
        batch_dims=batch_dims_of(module, tensor_name) if batch_dims is None else batch_dims,
    )


def make_site_(module: nn.Module, tensor_name: str, **options: Any) -> nn.Module:
    """Turn a tensor that is known to be untied into a site; `options` are those of LowRank."""
    base = check_target(module, tensor_name)
    low_rank = LowRank(base, **options)
    names = list(module._parameters)
    low_rank.base_successors = tuple(names[names.index(tensor_name) + 1 :])
    low_rank.train(module.training)
    # unsafe: torch would check that the parametrization returns a tensor; a LazyWeight is none.
    parametrize.register_parametrization(module, tensor_name, low_rank, unsafe=True)
    owner = low_rank_owner(module, tensor_name)
    owner.register_load_state_dict_pre_hook(_mend)  # type: ignore[no-untyped-call]  # torch's own
    share_class_(module)
    base.requires_grad_(False)
    base.grad = None  # otherwise an optimizer that still holds W would keep updating it
    return module


def remove_low_rank(
    module: nn.Module, tensor_name: str = "weight", *, merge: bool = True
) -> nn.Module:
    """Make `module.<tensor_name>` a plain Parameter again: the same object as before.

    Args:
        module: the module to change in place.
        tensor_name: the name of its low-rank tensor.
        merge: whether to keep the function by adding s B A to W first; otherwise the update is
            dropped.

    Returns:
        `module`.

    Raises:
        ValueError: if `module.<tensor_name>` is not a low-rank site, or is sharded; if W is tied
            and `merge` is true.

    Examples:
        >>> layer = nn.Linear(6, 4)
        >>> weight = layer.weight
        >>> remove_low_rank(register_low_rank(layer, rank=2)).weight is weight
        True
    """
    if tensor_name not in low_rank_tensors(module):
        raise ValueError(f"{type(module).__name__}.{tensor_name} is not a low-rank site")
    low_rank, base = low_rank_and_base(module, tensor_name)
    if low_rank._is_fully_sharded():
        raise ValueError(
            "a low-rank site cannot be removed after fully_shard: export with "
            "merged_state_dict, or remove it before sharding"
        )
    low_rank._refuse_torn(low_rank.name)
    if merge:
        refuse_ties({tensor_name: (low_rank_owner(module, tensor_name), "original")})
        low_rank._merge_into_(base)
    low_rank._unsplit_(base)
    own_class_(module)  # torch removes the property from the class
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    base.requires_grad_(low_rank.base_requires_grad)
    # torch appends W as the last Parameter. Its old place is restored, because an optimizer made
    # from module.parameters() numbers its state by their order.
    for name in low_rank.base_successors:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
    if is_low_rank(module):
        share_class_(module)
    return module


def _mend(owner: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: object) -> None:
    """Clear the torn mark of a site when its W is loaded from a state dict."""
    if prefix + "original" in state_dict:
        for low_rank in owner.children():
            assert isinstance(low_rank, LowRank)
            low_rank.torn = False


def _refuse_second(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Raise ValueError if a site's tensor is being parametrized a second time."""
    if not isinstance(module, parametrize.ParametrizationList) or name == "0":
        return
    if isinstance(submodule, nn.Module) and isinstance(module[0], LowRank):
        raise ValueError(
            f"{type(submodule).__name__} would parametrize a low-rank site a second time, which "
            "neither exports nor merges would take into account: use only one of the two"
        )


register_module_module_registration_hook(_refuse_second)


def low_rank_and_base(module: nn.Module, tensor_name: str) -> tuple[LowRank, nn.Parameter]:
    """Return a site's parametrization and its W."""
    found = low_rank_owner(module, tensor_name)
    low_rank, base = found[0], found.original
    assert isinstance(low_rank, LowRank)
    assert isinstance(base, nn.Parameter)
    return low_rank, base


def low_rank_owner(module: nn.Module, tensor_name: str) -> parametrize.ParametrizationList:
    """Return the ParametrizationList of a site, which holds W and the parametrization."""
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    found = lists[tensor_name]
    assert isinstance(found, parametrize.ParametrizationList)
    return found


def low_rank_tensors(module: nn.Module) -> list[str]:
    """Return the names of `module`'s own tensors that are low-rank sites."""
    # Not getattr: wrappers (checkpointing, compile) forward attributes to the inner module.
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return []
    return [
        name
        for name, one in lists.items()
        if isinstance(one, parametrize.ParametrizationList) and isinstance(one[0], LowRank)
    ]


def bank_names(module: nn.Module) -> list[str]:
    """Return the names of `module`'s low-rank banks, in the original order of its Parameters."""
    names: list[str] = []
    for name in low_rank_tensors(module):
        if low_rank_and_base(module, name)[0].batch_dims:
            before = [one for one in names if _came_before(module, one, name)]
            names.insert(len(before), name)
    return names


def _came_before(module: nn.Module, first: str, second: str) -> bool:
    """Whether Parameter `first` preceded `second`; its site was registered before `second`'s."""
    return second in low_rank_and_base(module, first)[0].base_successors


def is_low_rank(module: nn.Module) -> bool:
    """Whether a tensor of `module` itself (not of a child) is a low-rank site.

    Examples:
        >>> layer = nn.Linear(6, 4)
        >>> is_low_rank(layer), is_low_rank(register_low_rank(layer, rank=2))
        (False, True)
    """
    return bool(low_rank_tensors(module))

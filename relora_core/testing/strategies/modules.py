"""Hypothesis strategies for layers, modules with low-rank sites, and their histories."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn

from relora_core.low_rank.register import register_low_rank
from relora_core.sites.bases import split_bases_
from relora_core.sites.site import low_rank_sites
from relora_core.sites.targets import add_low_rank_
from relora_core.testing.examples import (
    Experts,
    NormalizedLinear,
    Residual,
    SelfAttention,
    SelfBilinear,
    TiedHead,
    TransposedLinear,
)
from relora_core.testing.expressions import Call
from relora_core.testing.history import EVENTS, Event

# One and small primes, some far apart, so that a matrix may be 1 x 31.
_SIZES = st.sampled_from([1, 2, 3, 5, 7, 31])


_ALPHAS = st.none() | st.sampled_from([1.0, 2.0, 0.5, 7.0])


@st.composite
def layers(draw: DrawFn, dtype: torch.dtype = torch.float32) -> Call:
    """Draw a layer of any kind that may have a low-rank site; the layer has none yet.

    The kinds are Linear, Embedding, convolutions (Conv1d to Conv3d and transposed, with groups),
    Bilinear, attention, and layers that use their weight with operators of their own.

    Args:
        draw: draw function, passed by hypothesis.
        dtype: dtype of the weights.

    Examples:
        >>> from hypothesis import find
        >>> find(layers(), lambda call: call.function is nn.Linear)
        nn.Linear(1, 1)
    """
    typed = {} if dtype == torch.float32 else {"dtype": dtype}
    kind = draw(st.sampled_from(["linear", "embedding", "conv", "bilinear", "attention", "own"]))
    if kind == "linear":
        bias = {"bias": False} if draw(st.booleans()) else {}
        return Call(nn.Linear, (draw(_SIZES), draw(_SIZES)), {**bias, **typed})
    if kind == "embedding":
        vocab, padding = draw(_SIZES), {"padding_idx": 0} if draw(st.booleans()) else {}
        return Call(nn.Embedding, (max(2, vocab), draw(_SIZES)), {**padding, **typed})
    if kind == "conv":
        convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
        conv, groups = draw(st.sampled_from(convs)), draw(st.sampled_from([1, 2]))
        channels = [groups * draw(st.sampled_from([1, 2, 3])) for _ in range(2)]
        options = {"groups": groups} if groups > 1 else {}
        return Call(conv, (*channels, draw(st.integers(1, 3))), {**options, **typed})
    if kind == "bilinear":
        return Call(SelfBilinear, (draw(st.sampled_from([1, 2, 5])), draw(_SIZES)), typed)
    if kind == "attention":
        return Call(SelfAttention, draw(st.sampled_from([(2, 1), (4, 2), (3, 3)])), typed)
    own = draw(st.sampled_from([TransposedLinear, NormalizedLinear]))
    return Call(own, (draw(_SIZES), draw(_SIZES)), typed)


@st.composite
def low_rank_modules(
    draw: DrawFn, dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16)
) -> Call:
    """Draw modules with low-rank sites: single layers, stacks, nested or tied modules, and banks.

    The rank is any that fits. The scale, the seed, biases, trained scales and dropout vary. A
    bfloat16 W is split by `split_bases_`; otherwise it would lose small merges.

    Args:
        draw: draw function, passed by hypothesis.
        dtypes: dtypes of the weights.

    Examples:
        >>> from hypothesis import find
        >>> find(low_rank_modules(), lambda call: "TiedHead" in repr(call))
        relora.add_low_rank_(testing.examples.TiedHead(2, 1), 'mix', rank=1)
    """
    dtype = draw(st.sampled_from(list(dtypes)))
    targets: Any = "*"
    typed = {} if dtype == torch.float32 else {"dtype": dtype}
    form = draw(st.sampled_from(["single", "stack", "nested", "tied", "projections", "bank"]))
    if form == "single":
        model = draw(layers(dtype))
    elif form == "tied":
        model, targets = Call(TiedHead, (draw(st.integers(2, 7)), draw(_SIZES)), typed), "mix"
    elif form == "bank":
        count = draw(st.integers(1, 3))
        sizes = {"out": draw(_SIZES), **typed}
        model, targets = Call(Experts, (count, draw(_SIZES)), sizes), "bank"
    elif form == "projections":
        heads = draw(st.integers(1, 2))
        model, targets = Call(nn.MultiheadAttention, (2 * heads, heads), typed), None
    else:
        inner, hidden, out = (draw(_SIZES) for _ in range(3))
        middle = Call(nn.Linear, (hidden, hidden), typed)
        if form == "nested":
            middle = Call(Residual, (Call(Residual, (middle,)), Call(nn.Tanh)))
        first, last = Call(nn.Linear, (inner, hidden), typed), Call(nn.Linear, (hidden, out), typed)
        model = Call(nn.Sequential, (first, Call(nn.Tanh), middle, last))
    made = draw(with_sites(model, targets))
    if form in ("stack", "nested") and draw(st.integers(0, 3)) == 3:
        made.kwargs["dropout"] = 0.5
    return Call(with_split_bases, (made,)) if dtype == torch.bfloat16 else made


@st.composite
def with_sites(draw: DrawFn, make: Call, targets: str | list[str] | None = "*") -> Call:
    """Draw factories of a module with low-rank sites; the rank, the scale and the seed vary.

    Args:
        draw: draw function, passed by hypothesis.
        make: factory of the module without sites.
        targets: the same as in `add_low_rank_`. If "*" and the module is itself a layer, the layer
            becomes the site. If None, the input projections of an attention become sites.

    Examples:
        >>> from hypothesis import find
        >>> find(with_sites(Call(nn.Linear, (5, 5))), lambda call: call.kwargs["rank"] > 2)
        relora.register_low_rank(nn.Linear(5, 5), rank=3)
    """
    with torch.random.fork_rng(devices=[]):
        whole = make()
    if targets == "*" and isinstance(whole, SelfAttention):
        targets = ["*", "*.in_proj_weight"]
    function: Callable[..., Any] = register_low_rank
    arguments: tuple[Any, ...] = (make,)
    if targets is None:
        arguments = (make, "in_proj_weight")
    elif targets != "*" or not is_layer(whole):
        function, arguments = add_low_rank_, (make, targets)
    bank = {"batch_dims": 1} if isinstance(whole, Experts) else {}
    function(whole, *arguments[1:], rank=1, **bank)
    largest = min(
        min(site.lora_B.shape[-2], site.lora_A.shape[-1]) for _, site in low_rank_sites(whole)
    )
    options: dict[str, Any] = {"rank": draw(st.integers(1, largest)), **bank}
    alpha, seed = draw(_ALPHAS), draw(st.sampled_from([0, 1, 2**63 - 1]))
    if alpha is not None:
        options["alpha"] = alpha
    if seed:
        options["seed"] = seed
    if draw(st.integers(0, 3)) == 3:
        options["trainable_scale"] = True
    return Call(function, arguments, options)


def is_layer(module: nn.Module) -> bool:
    """Whether a module itself has a weight that may become a site."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim > 1


def with_split_bases(model: nn.Module) -> nn.Module:
    """Return the model, after `split_bases_`.

    Examples:
        >>> from relora_core import register_low_rank
        >>> layer = with_split_bases(register_low_rank(nn.Linear(2, 2), rank=1))
        >>> layer.parametrizations.weight.original.dtype
        torch.bfloat16
    """
    split_bases_(model)
    return model


def histories(longest: int = 6) -> SearchStrategy[list[Event]]:
    """Draw the history of a model: events for `lived`, in any order.

    Args:
        longest: largest number of events.

    Examples:
        >>> from hypothesis import find
        >>> find(histories(), lambda events: len(events) > 1)
        ['fill', 'fill']
    """
    return st.lists(st.sampled_from(EVENTS), max_size=longest)

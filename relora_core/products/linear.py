"""The linear layer over W + s B A, and the choice of the form that computes it.

Shapes: T tokens, n inputs, m outputs, r rank. x (T, n), W (m, n), A (r, n), B (m, r), b (m).

Two paths, x Wᵀ + s (x Aᵀ) Bᵀ, are correct for every W. The merged form, x (W + s B A)ᵀ, saves the
2 T r (m + n) operations that apply B A beside W, and costs 4 m n r operations to form the sum in
forward and in backward. It is correct only if the sum is not rounded to 16 bits: with a 16-bit W,
the rounding drops most of a small update. (Rounding the sum of an fp32 W, under autocast, would be
correct, but measured slower than two paths.) So the merged form is used only in fp32 and wider, and
only where it pays; `docs/explanation/cost.md` has the measurements.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core._torch_private import is_exporting, is_tracing, is_transforming
from relora_core.products.merged import MergedLinear
from relora_core.products.one_path import OnePathLinear, following
from relora_core.products.two_paths import TwoPathLinear

# In units of m n / (m + n) tokens. From 2 on, the merged form takes fewer operations; the margin
# above 2 makes up for its passes over W.
MERGED_FROM = 5


def autocasts(device: str) -> bool:
    """Whether autocast is on for this kind of device (the meta device has none)."""
    return device != "meta" and torch.is_autocast_enabled(device)


def needs_plain() -> bool:
    """Whether `torch.func`, forward-mode differentiation, `torch.export` or a jit trace is active.

    All of these need plain operations: vmap has no rule for an in-place write, a `jvp` on the
    Function would rule out `torch.compile`, and an exported graph must fit every batch size.
    """
    if is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return is_tracing() or is_transforming()


def pays_merged(tokens: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the merged form is correct and faster when it computes in `dtype`."""
    m, n = weight.shape
    exact = weight.dtype == dtype and dtype in (torch.float32, torch.float64)
    if not exact:
        return False
    pays: Any = tokens * (m + n) >= MERGED_FROM * m * n  # a SymBool if `tokens` is a SymInt
    if pays is True or pays is False:
        return bool(pays)
    # If the number of tokens depends on data, the compiler cannot branch on it: take two paths.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(pays)


def low_rank_linear(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Apply `F.linear(input, weight + scale * lora_B @ lora_A, bias)`, with factored gradients.

    The factors are cast to `weight`'s dtype; under autocast everything is cast to autocast's dtype,
    as in `F.linear`. For backward the input is kept and, in two paths, T r more numbers. With
    dropout, the output of dropout and its mask are kept in place of the input.
    """
    if autocasts(input.device.type) and torch.float64 not in (input.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, W = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    else:
        dtype, W = weight.dtype, weight
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    if dropout or needs_plain():
        u = F.linear(F.dropout(input, dropout), A)
        return F.linear(input, W, bias) + scale * F.linear(u, B)
    x = input.reshape(-1, input.shape[-1])
    # Torch has no types for `apply`.
    if pays_merged(x.shape[0], weight, dtype):
        y = MergedLinear.apply(x, W, A, B, bias, scale)  # type: ignore[no-untyped-call]
    else:
        y = TwoPathLinear.apply(x, W, A, B, bias, scale)  # type: ignore[no-untyped-call]
    output: Tensor = y.reshape(*input.shape[:-1], weight.shape[0])
    return output


def computes_in(input: Tensor, dtype: torch.dtype) -> bool:
    """Whether a linear of `input` computes in `dtype`, by autocast or by itself."""
    if autocasts(input.device.type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type) == dtype
    return input.dtype == dtype


def merged_linear(
    input: Tensor, both: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """Apply `F.linear(input, V, bias)` with `both` = [V | B], V = W + scale * lora_B @ lora_A.

    This is for computations in the dtype of `both` only.
    """
    dtype = both.dtype
    input, A, B = input.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if needs_plain():
        V = following(both[:, : A.shape[1]], scale * (B @ A))
        return F.linear(input, V, bias)
    x = input.reshape(-1, input.shape[-1])
    # Torch has no types for `apply`.
    y = OnePathLinear.apply(x, both, A, B, bias, scale)  # type: ignore[no-untyped-call]
    output: Tensor = y.reshape(*input.shape[:-1], both.shape[0])
    return output

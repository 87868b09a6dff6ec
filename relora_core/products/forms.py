"""The form in which each function uses a lazy weight: two paths if possible, else the sum."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core._torch_private import grouped_mm
from relora_core.distributed.local import is_sharded
from relora_core.products.bilinear import einsum, in_whole_words, left_product, right_product
from relora_core.products.embedding import low_rank_embedding
from relora_core.products.factored import Factored, as_stored
from relora_core.products.linear import autocasts, computes_in, low_rank_linear, merged_linear


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """Return what `F.linear` returns."""
    others = (input, bias)
    plain = not any(isinstance(t, Factored) for t in others) and not input.is_nested
    if isinstance(weight, Factored) and plain:
        W, A, B, s = weight.base, weight.lora_A, weight.lora_B, weight.scale
        if weight.merged is not None and computes_in(input, weight.merged.dtype):
            return merged_linear(input, weight.merged, A, B, s, bias)
        if is_sharded(W) and is_sharded(input):
            from relora_core.products.tensor_parallel import parallel_linear

            return parallel_linear(low_rank_linear, input, W, A, B, s, bias)
        narrower = torch.promote_types(input.dtype, W.dtype) == W.dtype
        if narrower and input.is_floating_point() and not autocasts(W.device.type):
            # Layers kept in fp32 inside a 16-bit model cast like this if their weight is a Tensor.
            input = input.to(W.dtype)
        return low_rank_linear(input, W, A, B, s, bias, weight.dropout)
    return F.linear(*materialized((input, weight, bias)))


def product_of(func: Callable[..., Any], a: Any, b: Any) -> Any:
    """Return the product of two operands, one of which is lazy."""
    right = isinstance(b, Factored)
    lazy, x = (b, a) if right else (a, b)
    if not (isinstance(x, Tensor) and lazy.has_paths()) or holds_lazy(x) or x.is_nested:
        return func(*materialized((a, b)))
    if lazy.ndim == 2:
        if right:
            return linear(x, lazy.transposed())
        if x.ndim <= 2:
            return linear(x.t(), lazy).t()
        return func(*materialized((a, b)))
    W, A, B = lazy.base, lazy.lora_A.to(lazy.dtype), lazy.lora_B.to(lazy.dtype)
    if x.ndim == 1:  # as a matrix: a batch of vectors, (E, r), would pass for one matrix
        if right:
            return right_product(func, x.unsqueeze(0), W, A, B, lazy.scale).squeeze(-2)
        return left_product(func, x.unsqueeze(1), W, A, B, lazy.scale).squeeze(-1)
    return (right_product if right else left_product)(func, x, W, A, B, lazy.scale)


def sum_with_product(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """Return what `torch.addmm` returns; a linear with a bias is computed as one."""
    vector = isinstance(input, Tensor) and input.ndim == 1 and (beta, alpha) == (1, 1)
    if vector and isinstance(mat2, Factored) and mat2.ndim == 2 and mat2.has_paths():
        return linear(mat1, mat2.transposed(), input)
    return torch.addmm(*materialized((input, mat1, mat2)), beta=beta, alpha=alpha)


def in_order(x: Any, weight: Any) -> tuple[Any, Any]:
    """Return the operands of @ in their true order; dynamo (2.8 to 2.13) puts the tensor first.

    Raises:
        ValueError: if the shapes fit in both orders.
    """
    if not isinstance(weight, Factored):
        return x, weight
    right = x.shape[-1] == weight.shape[-2]
    left = x.shape[max(x.ndim - 2, 0)] == weight.shape[-1]
    if left and right:
        raise ValueError(
            "torch.compile cannot tell weight @ x from x @ weight, and both shapes fit: write "
            "torch.matmul(x, weight)"
        )
    return (weight, x) if left else (x, weight)


def grouped_product(
    input: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Return what `torch._grouped_mm` returns."""
    right = isinstance(mat2, Factored)
    lazy, x = (mat2, input) if right else (input, mat2)
    if holds_lazy(x) or not lazy.has_paths() or not lazy.batch_dims or bias is not None:
        a, b, offs, bias = materialized((input, mat2, offs, bias))
        return grouped_mm(a, b, offs, bias, out_dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = grouped_mm(a, b, offs, out_dtype=out_dtype)
        return found

    A, B = in_whole_words(lazy.lora_A.to(lazy.dtype), lazy.lora_B.to(lazy.dtype))
    return (right_product if right else left_product)(product, x, lazy.base, A, B, lazy.scale)


def einsum_of(equation: Any, *operands: Any) -> Any:
    """Return what `torch.einsum` returns."""
    if isinstance(equation, str):
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        place = next((i for i, one in enumerate(operands) if isinstance(one, Factored)), 0)
        lazy = operands[place]
        if holds_lazy(lazy) and lazy.has_paths():
            W, A, B = lazy.base, lazy.lora_A.to(lazy.dtype), lazy.lora_B.to(lazy.dtype)
            beside = einsum(equation, operands, place, A, B, lazy.scale)
            if beside is not None:
                others = (*operands[:place], W, *operands[place + 1 :])
                return torch.einsum(equation, *others) + beside
    return torch.einsum(equation, *materialized(operands))


def embedding(
    input: Tensor,
    weight: Factored,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return what `F.embedding` returns."""
    if max_norm is not None:
        raise ValueError(
            "an embedding with max_norm rewrites its weight at every look-up, which a low-rank "
            f"site forbids; got max_norm={max_norm}: build the embedding without it"
        )
    if scale_grad_by_freq or weight.dropout:  # materialize raises an error for dropout
        whole = weight.materialize()
        return F.embedding(input, whole, padding_idx, None, norm_type, True, sparse)
    W, A, B, s = weight.base, weight.lora_A, weight.lora_B, weight.scale
    # Autocast would round s B A, but not the rows of W that it is added to.
    with as_stored(weight.device.type):
        return low_rank_embedding(input, W, A, B, s, padding_idx, sparse)


def materialized(value: Any) -> Any:
    """Return a value, or a container, with each lazy weight in it materialized."""
    if isinstance(value, Factored):
        return value.materialize()
    if isinstance(value, (tuple, list)):
        return type(value)(materialized(item) for item in value)
    if isinstance(value, dict):
        return {key: materialized(item) for key, item in value.items()}
    return value


def holds_lazy(value: Any) -> bool:
    """Whether a value is a lazy weight, or has one in it."""
    some = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(one, Factored) for one in some)

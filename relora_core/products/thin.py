"""The sum of a thin product and a full one, the second added in place to the first.

A thin product is bound by memory bandwidth, a full one by arithmetic. If the full product reads the
thin one's result as its addend, the addition is free. The thin product is also rounded before it is
added, at its own smaller magnitude.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from relora_core._torch_private import is_dispatch_watched


def sum_of_products(
    u: Tensor, v: Tensor, x: Tensor, w: Tensor, s: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Return s u v + x w + bias, `(T, m)`; both products write to the same memory.

    When compiled, this is one custom operator, because the compiler would otherwise copy the
    addend and write the in-place product to new memory. Under a dispatch mode it is the same
    operator, because selective activation checkpointing can keep what an operator returns, but not
    what it writes in place.

    Args:
        u: `(T, r)`.
        v: `(r, m)`.
        x: `(T, n)`.
        w: `(n, m)`.
        s: the scale of the thin product.
        bias: `(m,)`.

    Examples:
        >>> one = torch.ones(1, 1)
        >>> sum_of_products(one, one, one, one, 0.5)
        tensor([[1.5000]])
    """
    if torch.compiler.is_compiling() or _is_seen():
        total: Tensor = _operator(u, v, x, w, s, bias)
        return total
    return _computed(u, v, x, w, s, bias)


def _is_seen() -> bool:
    """Whether a dispatch mode is active while gradients are off."""
    return is_dispatch_watched() and not torch.is_grad_enabled()


def _computed(u: Tensor, v: Tensor, x: Tensor, w: Tensor, s: float, bias: Tensor | None) -> Tensor:
    if bias is None:
        return (u @ v).addmm_(x, w, beta=s)
    return torch.addmm(bias, u, v, alpha=s).addmm_(x, w)


@torch.library.custom_op("relora::sum_of_products", mutates_args=())
def _operator(u: Tensor, v: Tensor, x: Tensor, w: Tensor, s: float, bias: Tensor | None) -> Tensor:
    return _computed(u, v, x, w, s, bias)


@_operator.register_fake
def _(u: Tensor, v: Tensor, x: Tensor, w: Tensor, s: float, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@register_flop_formula(torch.ops.relora.sum_of_products)
def _operations(
    u: tuple[int, int],
    v: tuple[int, int],
    x: tuple[int, int],
    w: tuple[int, int],
    *others: object,
    **known: object,
) -> int:
    """Return the operator's number of floating-point operations, from shapes."""
    return 2 * u[0] * v[1] * (u[1] + x[1])

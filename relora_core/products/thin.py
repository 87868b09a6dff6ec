"""The sum of a thin product and a full one, the second added in place to the first.

A thin product is bound by passes over memory, a full one by arithmetic: read as the addend of the
full one, the thin one's result costs nothing. It is also rounded at its own size, which is smaller.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from relora_core._torch_private import is_dispatch_watched


def sum_of_products(
    u: Tensor, v: Tensor, x: Tensor, w: Tensor, s: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Return s u v + x w + bias, `(T, m)`, in memory that both products write to.

    Compiled, it is one operator of its own, because an in-place product becomes one into new
    memory, for which the addend is copied first. So it is under a dispatch mode: selective
    activation checkpointing can keep what an operator returns, and not what one wrote in place.

    Args:
        u: `(T, r)`.
        v: `(r, m)`.
        x: `(T, n)`.
        w: `(n, m)`.
        s: the factor of the thin product.
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
    """Whether a dispatch mode looks on where nothing is to be differentiated."""
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
    """Return its floating-point operations, from shapes."""
    return 2 * u[0] * v[1] * (u[1] + x[1])

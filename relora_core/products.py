"""The sum of a thin product and a full one, the second added in place to the first.

A thin product is bound by passes over memory, a full one by arithmetic: read as the addend of the
full one, the thin one's result costs nothing. It is also rounded at its own size, which is smaller.
"""

import torch
from torch import Tensor


def sum_of_products(
    u: Tensor, v: Tensor, x: Tensor, w: Tensor, s: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Return s u v + x w + bias, `(T, m)`, in memory that both products write to.

    Compiled, it is one operator of its own, because an in-place product becomes one into new
    memory, for which the addend is copied first.

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
    if torch.compiler.is_compiling():
        total: Tensor = _operator(u, v, x, w, s, bias)
        return total
    return _computed(u, v, x, w, s, bias)


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

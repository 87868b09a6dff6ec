"""Products of W + s B A with another operand, in two paths: the sum is never formed.

V = W + s B A is a matrix, `(m, n)`, or a bank of matrices, `(E, m, n)`, with A `(E, r, n)` and B
`(E, m, r)`. A product is linear in V, so it is the product with W plus the product with the two
factors, one after the other:

    x V = x W + s (x B) A        V x = W x + s B (A x)

W's gradient is formed only if W is trained; the gradients of A and B have the factors' shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core.products.two_paths import scaled

Product = Callable[[Tensor, Tensor], Tensor]


def right_product(product: Product, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return `product(x, V)`."""
    return product(x, W) + scaled(product(product(x, B), A), s)


def left_product(product: Product, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return `product(V, x)`."""
    return product(W, x) + scaled(product(B, product(A, x)), s)


def in_whole_words(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors, their rank zero-padded to whole 16-byte words for a grouped product."""
    lacking = -A.shape[-2] % (16 // A.element_size())
    return (F.pad(A.mT, (0, lacking)).mT, F.pad(B, (0, lacking))) if lacking else (A, B)


def split_equation(equation: str, operands: Sequence[Any], place: int) -> tuple[str, bool] | None:
    """Return the equation of an einsum with one operand replaced by its two factors.

    Args:
        equation: the equation of the einsum, in letters.
        operands: the operands of the einsum.
        place: the index of the operand to replace, a matrix or a bank.

    Returns:
        The equation over the other operands followed by the two factors, and whether A is the
        first of the two. None if the factors would have to be multiplied by each other.

    Examples:
        >>> split_equation("eti,eoi->eto", [None, None], 1)
        ('eti,eri,eor->eto', True)
    """
    terms, arrow, output = equation.replace(" ", "").partition("->")
    inputs = terms.split(",")
    if "." in terms or len(inputs) != len(operands):
        return None
    if not arrow:
        output = "".join(sorted(c for c in set(terms) - {","} if terms.count(c) == 1))
    own, inputs = inputs[place], inputs[:place] + inputs[place + 1 :]
    others = "".join(inputs)
    free = [c for c in "rabcdefghijklmnopqstuvwxyz" if c not in terms + output]
    if len(set(own)) != len(own) or len(own) < 2 or not free:
        return None
    rank = free[0]
    bank, row, column = own[:-2], own[-2], own[-1]
    A, B = bank + rank + column, bank + row + rank
    if column in others:
        return f"{','.join([*inputs, A, B])}->{output}", True
    if row in others:
        return f"{','.join([*inputs, B, A])}->{output}", False
    return None


def einsum(
    equation: str, operands: Sequence[Any], place: int, A: Tensor, B: Tensor, s: float
) -> Any:
    """Return the einsum with s B A as one operand; None where `split_equation` returns None."""
    split = split_equation(equation, operands, place)
    if split is None:
        return None
    others = [one for index, one in enumerate(operands) if index != place]
    return scaled(torch.einsum(split[0], *others, *((A, B) if split[1] else (B, A))), s)

"""The low-rank linear over a W that tensor parallelism has split: each process takes its block.

If W and B are split by rows, each process computes its columns of y. If W and A are split by
columns, each process computes a partial y, and the partial results add up to y. Products, memory
and communication are those of the linear without sites. In addition, only the gradient of the
unsplit factor is summed over the processes.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from relora_core.distributed.dtensor import (
    columns_of,
    last_split,
    once,
    parts_of_sum,
    split_dim,
    summed,
    summing,
)
from relora_core.distributed.local import local

Linear = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def parallel_linear(
    linear: Linear,
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """Apply `F.linear(input, weight + scale * lora_B @ lora_A, bias)` to split tensors.

    Args:
        linear: the function that computes the low-rank linear of plain tensors.
        input: a DTensor, as are all the tensors here.
        weight: W, split over one dimension of a mesh.
        lora_A: A, split as W's columns.
        lora_B: B, split as W's rows.
        scale: s.
        bias: split as W's rows.
    """
    dim = split_dim(weight)
    if dim == 0:
        x, A, W, B = summed(input), summing(lora_A), local(weight), local(lora_B)
        b = None if bias is None else local(bias)
        return columns_of(linear(x, W, A, B, scale, b), weight)
    if dim == 1:
        x, A, W, B = last_split(input), local(lora_A), local(weight), summing(lora_B)
        b = None if bias is None else once(bias)
        return parts_of_sum(linear(x, W, A, B, scale, b), weight)
    return F.linear(input, weight, bias) + scale * F.linear(F.linear(input, lora_A), lora_B)

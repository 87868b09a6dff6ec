"""The two-path embedding: rows of W and of its low-rank update are looked up side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_embedding(
    input: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    """Apply `F.embedding(input, weight + scale * lora_B @ lora_A)` on the rows asked for.

    W[i] + s B[i] A, with W (entries, n), B (entries, r), A (r, n). The padding row gets no
    gradient, nor does A through it.
    """
    rows = F.embedding(input, weight, padding_idx, sparse=sparse)
    coefficients = F.embedding(input, lora_B, padding_idx, sparse=sparse).to(rows.dtype)
    update = scale * (coefficients @ lora_A.to(rows.dtype))
    if padding_idx is not None:
        padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
        update = torch.where(padding, update.detach(), update)
    return rows + update

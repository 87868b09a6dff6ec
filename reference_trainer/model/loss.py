"""Cross-entropy in chunks of tokens: the logits exist only once, in their original dtype."""

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
_ENTRIES = 2**24  # of a chunk: 64 MiB in fp32


class CrossEntropy(nn.Module):
    r"""$\frac{1}{c} \sum_t (\log \sum_v e^{z_{tv}} - z_{t y_t})$, every chunk of it in fp32.

    If gradients are on, forward overwrites the logits with their gradient. So backward may run only
    once, and nothing else may use the logits.

    Examples:
        >>> CrossEntropy()(torch.zeros(2, 4), torch.tensor([1, IGNORED]), divisor=1)  # log 4
        tensor(1.3863)
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_chunk = chunk_loss

    def forward(self, logits: Tensor, targets: Tensor, *, divisor: float) -> Tensor:
        """Return the loss, an fp32 scalar.

        Args:
            logits: z, `(tokens, vocabulary)`, changed in place.
            targets: y, `(tokens,)`, ids; `IGNORED` adds nothing.
            divisor: c: the number of targets for their mean, 1 for their sum.
        """
        loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            logits, targets, divisor, self.of_chunk
        )
        return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, divisor: float, of_chunk: Any) -> Tensor:
        needed, tokens = ctx.needs_input_grad[0], chunk_tokens(logits.shape[1])
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        chunks = torch.split(logits, tokens), torch.split(targets, tokens)
        for z, y in zip(*chunks, strict=True):
            total += of_chunk(z, y, divisor, needed)
        ctx.gradient = logits if needed else None
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError("the gradient of this loss has been used: run forward again")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grads[0]), None, None, None


def chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens a chunk has."""
    return max(1, _ENTRIES // vocabulary)


def chunk_loss(z: Tensor, y: Tensor, divisor: float, gradient: bool) -> Tensor:
    """Return the loss of a chunk; if `gradient` is true, overwrite the logits with its gradient."""
    logs = z.float().log_softmax(dim=1)
    counted = y != IGNORED
    place = torch.where(counted, y, 0).unsqueeze(1)
    loss = -torch.where(counted, logs.gather(1, place).squeeze(1), 0.0).sum() / divisor
    if gradient:
        p = logs.exp_().scatter_add_(1, place, torch.full_like(place, -1, dtype=logs.dtype))
        torch.mul(p, (counted / divisor).unsqueeze(1), out=z)
    return loss

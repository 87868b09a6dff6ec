"""Small layers and schedules that the strategies draw as examples."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

__all__ = [
    "Experts",
    "NormalizedLinear",
    "Residual",
    "SelfAttention",
    "SelfBilinear",
    "TiedHead",
    "TransposedLinear",
    "constant_times_exponential",
    "inverse_time",
    "nineteen_twentieths",
    "warmup_then_cosine",
]


def inverse_time(step: int) -> float:
    """Return 1 / (1 + step), for `LambdaLR`.

    Examples:
        >>> inverse_time(1)
        0.5
    """
    return 1 / (1 + step)


def nineteen_twentieths(step: int) -> float:
    """Return 0.95 at any step, for `MultiplicativeLR`.

    Examples:
        >>> nineteen_twentieths(1)
        0.95
    """
    return 0.95


def warmup_then_cosine(
    optimizer: torch.optim.Optimizer, *, milestone: int
) -> lr_scheduler.SequentialLR:
    """Return a warm-up followed by a cosine, combined by torch's `SequentialLR`.

    Args:
        optimizer: optimizer whose learning rate the scheduler sets.
        milestone: first step of the cosine.

    Examples:
        >>> from torch import nn
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> warmup_then_cosine(optimizer, milestone=5).get_last_lr()
        [0.1]
    """
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.1),
        lr_scheduler.CosineAnnealingLR(optimizer, 30),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[milestone])


def constant_times_exponential(
    optimizer: torch.optim.Optimizer, *, gamma: float
) -> lr_scheduler.ChainedScheduler:
    """Return the product of two schedulers, combined by torch's `ChainedScheduler`.

    Args:
        optimizer: optimizer whose learning rate the schedulers set.
        gamma: gamma of the exponential scheduler.

    Examples:
        >>> from torch import nn
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> constant_times_exponential(optimizer, gamma=0.5).get_last_lr()
        [0.5]
    """
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.ConstantLR(optimizer, 0.5, 4),
        lr_scheduler.ExponentialLR(optimizer, gamma),
    ]
    return lr_scheduler.ChainedScheduler(parts)


class SelfAttention(nn.Module):
    """Self-attention over a sequence.

    Args:
        width: size of the sequence's vectors.
        heads: number of heads, a divisor of `width`.
        dtype: dtype of the weights.

    Examples:
        >>> SelfAttention(4, 2)(torch.zeros(5, 2, 4)).shape
        torch.Size([5, 2, 4])
    """

    def __init__(self, width: int, heads: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, heads, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention output for `x`."""
        output: Tensor = self.attend(x, x, x)[0]
        return output


class SelfBilinear(nn.Module):
    """A bilinear layer applied to an input and itself.

    Args:
        inner: size of the input.
        out: size of the output.
        dtype: dtype of the weights.

    Examples:
        >>> SelfBilinear(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, inner: int, out: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.pair = nn.Bilinear(inner, inner, out, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return xᵀ W x + b."""
        output: Tensor = self.pair(x, x)
        return output


class TransposedLinear(nn.Module):
    """A linear layer whose weight has shape `(in, out)`, like GPT-2's in transformers.

    Args:
        inner: size of the input.
        out: size of the output.
        dtype: dtype of the weights.

    Examples:
        >>> TransposedLinear(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, inner: int, out: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features = inner
        self.weight = nn.Parameter(torch.randn(inner, out, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b."""
        return torch.addmm(self.bias, x, self.weight)


class NormalizedLinear(nn.Linear):
    """A linear layer that divides each row of its weight by the row's norm plus 1.

    Args:
        inner: size of the input.
        out: size of the output.
        dtype: dtype of the weights.

    Examples:
        >>> NormalizedLinear(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, inner: int, out: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(inner, out, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return x W'ᵀ + b."""
        rows = self.weight / (self.weight.norm(dim=1, keepdim=True) + 1)
        return F.linear(input, rows, self.bias)


class TiedHead(nn.Module):
    """A language model whose embedding and head share one matrix, with a linear layer between.

    Args:
        vocab: number of tokens in the vocabulary.
        width: size of the hidden vectors.
        dtype: dtype of the weights.

    Examples:
        >>> TiedHead(7, 3)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 7])
    """

    def __init__(self, vocab: int, width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, dtype=dtype)
        self.mix = nn.Linear(width, width, dtype=dtype)
        self.head = nn.Linear(width, vocab, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits over the vocabulary at each position."""
        logits: Tensor = self.head(self.mix(self.embed(tokens)).tanh())
        return logits


class Residual(nn.Sequential):
    """A residual block x + f(x), which can be nested; f must keep the width.

    Examples:
        >>> Residual(nn.Linear(3, 3))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return x + f(x)."""
        x = input
        for module in self:
            x = module(x)
        return input + x


class Experts(nn.Module):
    """A bank of linear layers that all receive the same input.

    Args:
        count: number of layers.
        in_features: size of the input.
        out: size of each output.
        dtype: dtype of the weights.

    Examples:
        >>> Experts(3, 4, out=2)(torch.zeros(5, 4)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self, count: int, in_features: int, *, out: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.bank = nn.Parameter(torch.randn(count, out, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of each layer for `x`."""
        return torch.einsum("ti,eoi->teo", x, self.bank)

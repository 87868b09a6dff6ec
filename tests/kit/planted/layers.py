"""A sound low-rank layer as users write them, and broken ones.

Each is a bug of public ReLoRA or LoRA code as it stood in 2026, in a few lines.
"""

from types import SimpleNamespace

import torch
from torch import nn


class Layer(nn.Module):
    """x (W + s B A)ᵀ, sound."""

    def __init__(self, inner=3, out=2, rank=1, alpha=1.0, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inner, dtype=dtype), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, inner, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))
        self.register_buffer("restart", torch.tensor(0))
        self.scale = alpha / rank

    def forward(self, x):
        return x @ self.weight.T + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    @torch.no_grad()
    def merge_(self):
        self.weight += self.scale * (self.lora_B @ self.lora_A)
        self.lora_B.zero_()

    @torch.no_grad()
    def redraw_(self):
        self.restart += 1
        generator = torch.Generator().manual_seed(int(self.restart))
        self.lora_A.copy_(torch.randn(self.lora_A.shape, generator=generator))
        self.lora_B.zero_()


class ZeroFactors(Layer):
    """The authors' first cycle: A and B are both zero."""

    def __init__(self, **options):
        super().__init__(**options)
        nn.init.zeros_(self.lora_A)


class MergeWithoutScale(Layer):
    """relora-pico's merge."""

    @torch.no_grad()
    def merge_(self):
        self.weight += self.lora_B @ self.lora_A
        self.lora_B.zero_()


class MergeKeepsB(Layer):
    """A merge that forgets that B A is in W now."""

    @torch.no_grad()
    def merge_(self):
        self.weight += self.scale * (self.lora_B @ self.lora_A)


class MergeThroughHalf(Layer):
    """axolotl's merge into shards of float16."""

    @torch.no_grad()
    def merge_(self):
        super().merge_()
        self.weight.copy_(self.weight.half())


class MergeInGraph(Layer):
    """The authors' functional merge, outside no_grad: W is another Parameter, and trained."""

    def merge_(self):
        self.weight = nn.Parameter(self.weight + self.scale * (self.lora_B @ self.lora_A))
        nn.init.zeros_(self.lora_B)


class MergeIsNotCalled(Layer):
    """Lightning-ReLoRA's merge: named, and not called."""

    def merge_(self):
        super().merge_  # noqa: B018 - the bug


class MergeRaises(Layer):
    """The authors' 8-bit merge: a slip of the pen."""

    def merge_(self):
        self.self.lora_B.zero_()


class SixteenBits(Layer):
    """W in bfloat16, as everywhere: it loses most of what is merged (peft #1388)."""

    def __init__(self, **options):
        super().__init__(dtype=torch.bfloat16, **options)


class SixteenBitsRoundedOnce(SixteenBits):
    """The same, with a sum in float32: what is less than half a unit of W is lost all the same."""

    @torch.no_grad()
    def merge_(self):
        update = self.scale * (self.lora_B.float() @ self.lora_A.float())
        self.weight.copy_(self.weight.float() + update)
        self.lora_B.zero_()


class DeadScale(Layer):
    """The authors' trainable scaling: tanh of a number that a merge zeroes."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.scale
        self.scaling = nn.Parameter(torch.ones(1))

    @property
    def scale(self):
        return self.scaling.tanh()

    @scale.deleter
    def scale(self):
        pass

    @scale.setter
    def scale(self, value):
        pass

    @torch.no_grad()
    def merge_(self):
        super().merge_()
        self.scaling.zero_()


class GlobalDraw(Layer):
    """A redraw from torch's global generator, which processes use differently."""

    @torch.no_grad()
    def redraw_(self):
        nn.init.kaiming_uniform_(self.lora_A)
        self.lora_B.zero_()


class SameDraw(Layer):
    """A redraw that is seeded alike on all processes, and at all restarts."""

    @torch.no_grad()
    def redraw_(self):
        generator = torch.Generator().manual_seed(0)
        self.lora_A.copy_(torch.randn(self.lora_A.shape, generator=generator))
        self.lora_B.zero_()


class SpectralDraw(Layer):
    """A redraw as PiSSA's or OLoRA's first one: both factors from W, which changes the function."""

    @torch.no_grad()
    def redraw_(self):
        U, S, Vh = torch.linalg.svd(self.weight, full_matrices=False)
        rank = len(self.lora_A)
        self.lora_A.copy_(S[:rank, None] * Vh[:rank])
        self.lora_B.copy_(U[:, :rank])


class CountIsNotSaved(Layer):
    """A resume that forgets how many redraws there were."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.restart
        self.restart = 0


class TrainedBase(Layer):
    """W is not frozen."""

    def __init__(self, **options):
        super().__init__(**options)
        self.weight.requires_grad_(True)


class TiedPair(nn.Module):
    """Two layers over one W: a merge of either moves the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(inner=2), Layer(inner=2)
        self.second.weight = self.first.weight
        self.second.restart += 7

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Unused(nn.Module):
    """A plain layer that keeps its weight from before it became low-rank, as caches do."""

    def __init__(self):
        super().__init__()
        self.in_features = 3
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.cached = SimpleNamespace(weight=self.weight)

    def forward(self, x):
        return x @ self.cached.weight.T


class _MatMul(torch.autograd.Function):
    """A kernel that asks which gradients are needed."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        ctx.w = w.detach()
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g @ ctx.w, g.t() @ x if ctx.needs_input_grad[1] else None


class Fused(nn.Linear):
    """Gives its weight to a Function, which sees no gradient in it."""

    def forward(self, x):
        y = _MatMul.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def fused():
    """Return one of 3 x 2."""
    return Fused(3, 2, bias=False)

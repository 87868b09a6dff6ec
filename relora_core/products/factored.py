"""W, A, B and s of a lazy weight, kept as factors; the sum is formed only when needed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor

from relora_core.products.linear import autocasts
from relora_core.products.one_path import following


class Factored:
    """W + s B A, not formed; `LazyWeight` documents the arguments."""

    base: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout: float
    merged: Tensor | None

    def __init__(
        self,
        base: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float | Tensor,
        dropout: float = 0.0,
        merged: Tensor | None = None,
    ) -> None:
        if isinstance(scale, Tensor):  # scale A, so that s is a number wherever it is used
            lora_A, scale = scale * lora_A, 1.0
        # Not by assignment: LazyWeight refuses it.
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "lora_A", lora_A)
        object.__setattr__(self, "lora_B", lora_B)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "dropout", dropout)
        object.__setattr__(self, "merged", merged)

    def materialize(self) -> Tensor:
        """Return W + s B A as a tensor of this dtype, differentiable in W, A and B."""
        if self.dropout:
            raise ValueError(
                "dropout acts on the input of F.linear, and this operation needs the weight "
                f"whole; got dropout={self.dropout:g}: register the tensor without dropout"
            )
        if self.merged is not None:
            return following(self.merged[:, : self.shape[1]], self.delta())
        return add_rounding_once(self.base, self.delta())

    def delta(self) -> Tensor:
        """Return s B A in W's shape, in W's dtype or a wider one, fp32 at least."""
        wide = torch.float32
        for tensor in (self.base, self.lora_A, self.lora_B):
            wide = torch.promote_types(wide, tensor.dtype)
        # Autocast would form it in 16 bits, whatever the weights are stored in.
        with as_stored(self.device.type):
            return self.scale * (self.lora_B.to(wide) @ self.lora_A.to(wide)).view(self.shape)

    @property
    def batch_dims(self) -> int:
        """The number of leading batch dimensions."""
        return self.lora_A.ndim - 2

    def has_paths(self) -> bool:
        """Whether products may take two paths."""
        return self.merged is None and not self.dropout and self.base.ndim == self.lora_A.ndim

    def transposed(self) -> Self:
        """Return Vᵀ = Wᵀ + s Aᵀ Bᵀ, of every matrix of a bank."""
        return type(self)(self.base.mT, self.lora_B.mT, self.lora_A.mT, self.scale)

    @property
    def shape(self) -> torch.Size:
        """W's shape."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """W's dtype, or that of its merged copy."""
        return self.base.dtype if self.merged is None else self.merged.dtype

    @property
    def device(self) -> torch.device:
        """W's device."""
        return self.base.device

    @property
    def ndim(self) -> int:
        """W's number of dimensions."""
        return self.base.ndim


def as_stored(device: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for this kind of device."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def add_rounding_once(base: Tensor, update: Tensor) -> Tensor:
    """Return `base + update` in `base`'s dtype, added in `update`'s, which is no narrower."""
    return (base.to(update.dtype) + update).to(base.dtype)

"""Moments kept in 8 or 4 bits: the values of their codes, and the code of zero.

An entry is zeroed through its code alone. The scale of its block and the values of all other
entries do not change.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relora_core.distributed.local import local
from relora_core.distributed.sharding import sharded_like

_BLOCK = 256  # entries that share a scale in bitsandbytes
_TORCHAO = {"OptimState8bit", "OptimState4bit", "OptimStateFp8"}


@dataclass(frozen=True)
class TableMoment:
    """A moment of bitsandbytes: value = table[code] * scale of its block of 256.

    Args:
        tensor: the codes, uint8.
        table: the 256 values of the codes. Zero is among them: value 127 if they are signed, else
            value 0.
        scales: one scale per block, in memory order.

    Raises:
        ValueError: if there is not one scale for every 256 codes.
    """

    tensor: Tensor
    table: Tensor
    scales: Tensor
    has_zero: bool = True

    def __post_init__(self) -> None:
        blocks = -(-self.tensor.numel() // _BLOCK)
        if self.scales.numel() != blocks:
            raise ValueError(
                f"an 8-bit moment must have a scale for each {_BLOCK} codes, {blocks} for "
                f"{self.tensor.numel()}; got {self.scales.numel()}: use bitsandbytes 0.45 or later"
            )

    def values(self) -> Tensor:
        """Return the values of the codes."""
        flat = self.tensor.flatten()
        scales = self.scales.repeat_interleave(_BLOCK)[: flat.numel()]
        return (self.table[flat.int()] * scales).view(self.tensor.shape)

    def zero_where_(self, mask: Tensor) -> None:
        """Write the code of zero where `mask` is set."""
        self.tensor.masked_fill_(mask, _zero_code(self.table))


@dataclass(frozen=True)
class QuantizedMoment:
    """A moment of torchao: a tensor subclass with codes, a scale for each block, and a table.

    The table of the 4-bit second moment, 1/16 to 1, has no zero. There, only a whole block can be
    zeroed, through its scale.

    Args:
        tensor: the tensor subclass, or a DTensor with such local parts.
    """

    tensor: Tensor

    @property
    def has_zero(self) -> bool:
        """Whether every single entry can be set to zero."""
        part: Any = local(self.tensor)
        return type(part).__name__ != "OptimState4bit" or bool(part.signed)

    def values(self) -> Tensor:
        """Return the values of the codes, in fp32."""
        part: Any = local(self.tensor)
        return sharded_like(part.dequantize(torch.float32), self.tensor)

    def zero_where_(self, mask: Tensor) -> None:
        """Write the code of zero where `mask` is set, and zero the scales of blocks it fills."""
        part: Any = local(self.tensor)
        gone = mask.flatten()
        kind = type(part).__name__
        if kind == "OptimStateFp8":
            part.codes.view(torch.uint8).masked_fill_(mask, 0)
        elif kind == "OptimState8bit":
            part.codes.masked_fill_(mask, _zero_code(part.qmap))
        else:  # two codes a byte, the first in the upper half
            codes = torch.stack([part.codes >> 4, part.codes & 0b1111], dim=-1).flatten()
            codes.masked_fill_(gone, _zero_code(part.qmap))
            part.codes.copy_((codes[::2] << 4) | codes[1::2])
        part.scale.masked_fill_(gone.view(-1, part.block_size).all(1), 0)


def is_quantized(tensor: Tensor) -> bool:
    """Whether this is a torchao moment, sharded or not."""
    return type(local(tensor)).__name__ in _TORCHAO


def _zero_code(table: Tensor) -> Tensor:
    return table.abs().argmin().to(torch.uint8)

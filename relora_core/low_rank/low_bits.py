"""An fp32 number in two halves: the nearest bfloat16, and the 16 bits that it lacks."""

import torch
from torch import Tensor


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return `value` rounded to bfloat16, and the int16 that `join` needs to undo the rounding.

    A tie rounds away from zero, because torch's rounding to even could not be undone.

    Args:
        value: an fp32 tensor of any shape. Every NaN becomes torch's default NaN.

    Examples:
        >>> upper, low = split(torch.tensor([1.0, 1.0 + 2**-20]))
        >>> upper, low
        (tensor([1., 1.], dtype=torch.bfloat16), tensor([0, 8], dtype=torch.int16))
    """
    # Rounding the bits of CUDA's NaN would carry into the sign bit.
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
    upper = (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    return upper, bits.to(torch.int16)


def join(upper: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 numbers that were split: `join(*split(value))` is `value`, bit for bit.

    Examples:
        >>> join(*split(torch.tensor([0.1]))).equal(torch.tensor([0.1]))
        True
    """
    bits = (upper.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)

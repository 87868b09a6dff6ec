"""Random numbers that depend on nothing but their key: the same on every process and device."""

import hashlib

import torch
from torch import Tensor


def keyed_uniform(key: str, shape: torch.Size, *, bound: float, pinned: bool = False) -> Tensor:
    """Draw fp32 numbers, uniform in ± `bound`, on the CPU; the global generator is left alone.

    `uniform_` in fp32 gives the same bits on every CPU, which `normal_` does not.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    empty = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
    return empty.uniform_(-bound, bound, generator=generator)

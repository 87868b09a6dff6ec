"""Ceilings of GPUs as measured: how fast they multiply, and how fast they move memory.

Products in 16 bits are the best of a search over large shapes, summed in fp32; memory is copies or
triads over arrays that no cache holds. Products in fp32 are the data sheets' (without TF32). Where
each is from:

- H100 SXM, A100 SXM, products: "Maximum Achievable Matmul FLOPS" of
  https://github.com/stas00/ml-engineering (compute/accelerator); of the H200 it says that it is the
  same as the H100.
- H100 SXM, memory: p2pBandwidthLatencyTest's copy within a GPU,
  https://github.com/NVIDIA/cuda-samples/issues/392.
- H200, memory: the triad of https://github.com/te42kyfo/gpu-benches (gpu-stream), as for A100 of
  80 GB (cuda-stream) and of 40 GB (gpu-stream).
- RTX 3090, products: https://github.com/zzc0721/torch-performance-test-data, square products;
  memory: p2pBandwidthLatencyTest, https://github.com/NVIDIA/nccl/issues/1127.
- RTX 4090, products: https://github.com/mag-/gpu_benchmark; memory:
  https://github.com/xytpai/nvbench.
"""

from dataclasses import dataclass

import torch

from reference_trainer.bench.kernels import Kernel


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reaches at most.

    Args:
        narrow: operations a second of products in 16 bits.
        wide: of products in fp32.
        bandwidth: bytes a second, read and written.
    """

    narrow: float
    wide: float
    bandwidth: float

    def seconds(self, kernel: Kernel) -> float:
        """Return what a kernel takes, all its launches, by the ceiling that binds it."""
        return kernel.times * max(self._arithmetic(kernel), kernel.moved / self.bandwidth)

    def bound(self, kernel: Kernel) -> str:
        """Return which ceiling binds a kernel: "arithmetic" or "memory"."""
        memory = kernel.moved / self.bandwidth
        return "arithmetic" if self._arithmetic(kernel) > memory else "memory"

    def _arithmetic(self, kernel: Kernel) -> float:
        narrow = kernel.dtype in (torch.bfloat16, torch.float16)
        return kernel.flops / (self.narrow if narrow else self.wide)


CEILINGS = {
    "h200": Ceilings(794.5e12, 67e12, 3534e9),
    "h100": Ceilings(794.5e12, 67e12, 2959e9),
    "a100-80gb": Ceilings(271.2e12, 19.5e12, 1759e9),
    "a100-40gb": Ceilings(271.2e12, 19.5e12, 1375e9),
    "rtx4090": Ceilings(178.5e12, 82.6e12, 921.9e9),
    "rtx3090": Ceilings(76.3e12, 35.6e12, 837.6e9),
}

"""Measured ceilings of GPUs: the speed of matrix products and the memory bandwidth.

The speed of 16-bit products, summed in fp32, is the best of a search over large shapes. The
bandwidth is that of copies or triads over arrays larger than any cache. The speed of fp32 products
(without TF32) is from the data sheets. The sources are:

- H100 SXM, A100 SXM, products: "Maximum Achievable Matmul FLOPS" in
  https://github.com/stas00/ml-engineering (compute/accelerator), which states that the H200 equals
  the H100.
- H100 SXM, memory: the copy within a GPU by p2pBandwidthLatencyTest,
  https://github.com/NVIDIA/cuda-samples/issues/392.
- H200 and A100, memory: the triad of https://github.com/te42kyfo/gpu-benches: gpu-stream for the
  H200 and the A100 of 40 GB, cuda-stream for the A100 of 80 GB.
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
    """The measured ceilings of a GPU.

    Args:
        narrow: operations per second of 16-bit products.
        wide: operations per second of fp32 products.
        bandwidth: bytes per second, read and written.
    """

    narrow: float
    wide: float
    bandwidth: float

    def seconds(self, kernel: Kernel) -> float:
        """Return the seconds of all launches of a kernel, at the ceiling that limits it."""
        return kernel.times * max(self._arithmetic(kernel), kernel.moved / self.bandwidth)

    def bound(self, kernel: Kernel) -> str:
        """Return the ceiling that limits a kernel: "arithmetic" or "memory"."""
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

"""Stage 1: the machine's bandwidths, the speed of a large product, and the attention kernels."""

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from reference_trainer.bench.suite.records import Report
from reference_trainer.bench.suite.sizes import Sizes
from reference_trainer.bench.suite.timing import medians


def run(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Measure copies within the device and from the host, a product, and attention."""
    cuda, ceilings = device.type == "cuda", sizes.ceilings
    if cuda:
        memory = torch.cuda.get_device_properties(device).total_memory
        report.measured("memory of the GPU", memory, "bytes")
    n = 8192 if cuda else 256
    source = torch.empty(2**30 if cuda else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=cuda)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    found = medians(
        {
            "copy": lambda: target.copy_(source),
            "from the host": lambda: target.copy_(host, non_blocking=True),
            "to the host": lambda: host.copy_(source, non_blocking=True),
            "product": lambda: a @ b,
        },
        device,
        repeats=sizes.repeats,
    )
    size = source.nbytes
    bandwidth = ceilings.bandwidth if ceilings else None
    narrow = ceilings.narrow if ceilings else None
    report.measured("copy on the device", 2 * size / found["copy"], "bytes/s", expected=bandwidth)
    for way in ("from the host", "to the host"):
        report.measured(f"copy {way}, pinned", size / found[way], "bytes/s")
    product = 2 * n**3 / found["product"]
    report.measured(f"product of {n} x {n}, bf16", product, "FLOP/s", expected=narrow)
    report.write("kernels", what="attention", names=_attending(sizes, device))


def _attending(sizes: Sizes, device: torch.device) -> list[str]:
    heads = sizes.shape.heads, sizes.length, sizes.shape.head_size
    q, k, v = (
        torch.randn(1, *heads, dtype=torch.bfloat16, device=device, requires_grad=True)
        for _ in range(3)
    )

    def attend() -> None:
        torch.autograd.backward(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum())

    attend()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        attend()
    names = (event.key for event in profiler.key_averages())
    return [name for name in names if "flash" in name or "attention" in name or "fmha" in name]

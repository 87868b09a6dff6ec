"""The memory and the link speeds of GPUs, by name."""

from reference_trainer.bench.projection import CLUSTERS, Cluster

GiB = 2**30
_H100, _A100 = CLUSTERS

#: Each GPU's memory in bytes, as CUDA reports it, and its cluster; RTX cards use PCIe 4.0.
GPUS: dict[str, tuple[float, Cluster]] = {
    "h200": (139.8 * GiB, Cluster("H200", "h200", 8, 450e9, 400e9)),
    "h100": (79.2 * GiB, _H100),
    "a100-80gb": (79.2 * GiB, _A100),
    "a100-40gb": (39.4 * GiB, Cluster("A100 40 GB", "a100-40gb", 8, 300e9, 50e9)),
    "rtx4090": (23.6 * GiB, Cluster("RTX 4090", "rtx4090", 8, 25e9, 12.5e9)),
    "rtx3090": (23.6 * GiB, Cluster("RTX 3090", "rtx3090", 8, 25e9, 12.5e9)),
}

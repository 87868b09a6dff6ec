"""A model of communication times on clusters, from bytes and link speeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """A cluster of identical nodes.

    Args:
        name: name in tables.
        gpu: name of the GPU in `CEILINGS`.
        node: number of GPUs on a node.
        inside: bytes per second that a GPU sends within its node.
        outside: bytes per second that a node sends to other nodes.
        near: latency of a message within a node, in seconds.
        far: latency of a message between nodes, in seconds.
    """

    name: str
    gpu: str
    node: int
    inside: float
    outside: float
    near: float = 2e-6
    far: float = 5e-6


CLUSTERS = (
    Cluster("8 x H100 a node, 3200 Gb/s between nodes", "h100", 8, 450e9, 400e9),
    Cluster("8 x A100 a node, 400 Gb/s between nodes", "a100-80gb", 8, 300e9, 50e9),
)


def seconds_of(sent: dict[str, Any], cluster: Cluster) -> float:
    r"""Return the seconds of collectives: bytes over bandwidth, plus the latency of all hops.

    All-gathers and reduce-scatters use rings of n GPUs: a message makes n - 1 hops, one per node
    between nodes. All-reduces use trees, with $2 \log_2 n$ hops. A group that spans nodes has its
    share of the node's bandwidth, limited by the bandwidth of a GPU.

    Args:
        sent: entry of `bench traffic`: collective, processes, stride, calls, bytes.
        cluster: cluster on which the collectives run.
    """
    n = sent["processes"]
    here = min(n, max(1, cluster.node // sent["stride"]))  # processes of the group on one node
    nodes = ceil(n / here)
    if nodes == 1:
        bandwidth, far = cluster.inside, 0
    else:
        bandwidth, far = min(cluster.inside, cluster.outside * here / cluster.node), nodes
    if sent["collective"] == "all-reduce":
        inner, outer = log2(here), log2(nodes)
        hops = 2 * (inner * cluster.near + outer * cluster.far)
    else:
        hops = max(n - 1 - far, 0) * cluster.near + far * cluster.far
    return float(sent["bytes"] / bandwidth + sent["calls"] * hops)


def communication_seconds(
    step: Sequence[dict[str, Any]],
    micro_step: Sequence[dict[str, Any]],
    cluster: Cluster,
    *,
    micro_steps: int,
) -> float:
    """Return the seconds of a step's collectives, one after the other.

    Args:
        step: entries of `bench traffic` for a step of one micro-step.
        micro_step: entries of `bench traffic` for each further micro-step.
        cluster: cluster on which the collectives run.
        micro_steps: number of micro-steps in the step.
    """
    further = (micro_steps - 1) * sum(seconds_of(sent, cluster) for sent in micro_step)
    return sum(seconds_of(sent, cluster) for sent in step) + further

"""A model of what clusters that are not at hand take to send: from bytes and link speeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, all alike.

    Args:
        name: as a table shows it.
        gpu: of `CEILINGS`.
        node: GPUs on a node.
        inside: bytes a second that a GPU sends to its node.
        outside: bytes a second that a node sends to the others.
        near: seconds of a message's way within a node.
        far: seconds of its way between nodes.
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
    r"""Return how long collectives take: bytes over bandwidth, and hops of a message.

    All-gathers and reduce-scatters run over rings of n GPUs, so that a message hops n - 1 times,
    between nodes as often as there are nodes; all-reduces over trees, $2 \log_2 n$ hops. A group
    that spans nodes gets its share of what a node sends, and no more than a GPU can.

    Args:
        sent: one entry of `bench traffic`: collective, processes, stride, calls, bytes.
        cluster: where.
    """
    n = sent["processes"]
    here = min(n, max(1, cluster.node // sent["stride"]))  # of the group, on a node
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
    """Return how long a step's collectives take, one after the other.

    Args:
        step: what `bench traffic` counts of a step of one micro-step.
        micro_step: of each further one.
        cluster: where.
        micro_steps: of a step.
    """
    further = (micro_steps - 1) * sum(seconds_of(sent, cluster) for sent in micro_step)
    return sum(seconds_of(sent, cluster) for sent in step) + further

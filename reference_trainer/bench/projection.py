"""A model of step times on clusters that are not at hand: from bytes, operations and link speeds.

Nothing of it is measured but the bytes, which `bench --comm` counts.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from reference_trainer.flops import Form, step_flops
from reference_trainer.model import LlamaShape


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, all alike.

    Args:
        name: as a table shows it.
        node: GPUs on a node.
        flops: peak operations of a GPU in bf16, a second, dense.
        used: the share of them that training reaches.
        inside: bytes a second that a GPU sends to its node.
        outside: bytes a second that a node sends to the others.
        near: seconds of a message's way within a node.
        far: seconds of its way between nodes.
    """

    name: str
    node: int
    flops: float
    used: float
    inside: float
    outside: float
    near: float = 2e-6
    far: float = 5e-6


CLUSTERS = (
    Cluster("8 x H100 a node, 3200 Gb/s between nodes", 8, 989e12, 0.4, 450e9, 400e9),
    Cluster("8 x A100 a node, 400 Gb/s between nodes", 8, 312e12, 0.4, 300e9, 50e9),
)


def seconds_of(sent: dict[str, Any], cluster: Cluster) -> float:
    r"""Return how long collectives take: bytes over bandwidth, and hops of a message.

    All-gathers and reduce-scatters run over rings of n GPUs, so that a message hops n - 1 times,
    between nodes as often as there are nodes; all-reduces over trees, $2 \log_2 n$ hops. A group
    that spans nodes gets its share of what a node sends, and no more than a GPU can.

    Args:
        sent: one entry of `bench --comm`: collective, processes, stride, calls, bytes.
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


def step_seconds(
    record: dict[str, Any],
    shape: LlamaShape,
    cluster: Cluster,
    *,
    sequences: int,
    length: int,
    micro: int,
    rank: int,
) -> tuple[float, float]:
    """Return a step's computation and its communication, in seconds, one after the other.

    What overlaps of them is for the reader to assume: between all (the larger one counts) and
    nothing (their sum). Every micro-batch gathers weights; gradients are reduced once.

    Args:
        record: of `bench --comm`, with one micro-batch.
        shape: of the model.
        cluster: where.
        sequences: of a step, over all GPUs.
        length: tokens of each.
        micro: sequences that a GPU computes at once.
        rank: of the sites.
    """
    form: Form = "two paths" if "restart" in record else "full rank"
    operations = step_flops(form, shape, sequences=sequences, length=length, rank=rank)
    compute = operations / record["processes"] / (cluster.flops * cluster.used)
    micro_steps = max(1, sequences // record["processes"] // micro)
    repeated = [s for s in record["step"] if s["collective"] == "all-gather"]
    once = [s for s in record["step"] if s["collective"] != "all-gather"]
    gathers = sum(seconds_of(sent, cluster) for sent in repeated)
    return compute, micro_steps * gathers + sum(seconds_of(sent, cluster) for sent in once)

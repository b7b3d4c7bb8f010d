"""How long processes take to average their gradients, and what of it the backward pass hides: a model, no measurement.

GPUs of one node add up in a ring over its links; then each takes its part of the sum to the other nodes over its own
network card, in a ring's time but for the hops, which are a tree's (NCCL's double binary tree); then back. For b bytes,
n GPUs in a node and m nodes:

    2 (n - 1) / n x b / link + 2 (n - 1) hops  +  2 (m - 1) / m x b / n / network + 2 log2(m) hops

DistributedDataParallel sends gradients in buckets, each as soon as it is full, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

NODE = 8  # GPUs
HOP_SECONDS = 5e-6  # from one GPU to the next, whatever is sent; an assumption
INFINIBAND = 50.0  # GB/s of a GPU: a card of 400 Gb/s for each
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes that DistributedDataParallel fills before it sends


@dataclass(frozen=True)
class Interconnect:
    """GB/s of each GPU, each way: to the others of its node, and to other nodes."""

    link: float
    network: float = INFINIBAND

    def all_reduce(self, size: float, processes: int) -> float:
        """Seconds until all have the sum of `size` bytes. Nodes are taken to be as full as they can be."""
        local = min(processes, NODE)
        nodes = ceil(processes / local)
        within = 2 * (local - 1) * (size / local / (1e9 * self.link) + HOP_SECONDS)
        between = 2 * (nodes - 1) / nodes * size / local / (1e9 * self.network) + 2 * ceil(log2(nodes)) * HOP_SECONDS
        return within + between

    def after_backward(self, buckets: Sequence[float], backward: float, processes: int) -> float:
        """Seconds that the exchange of `buckets`, in bytes, goes on after a backward pass of so many seconds.

        The backward pass fills the buckets one after the other, at a constant rate.
        """
        filled, sent, whole = 0.0, 0.0, sum(buckets)
        for size in buckets:
            filled += size
            sent = max(sent, backward * (filled / whole)) + self.all_reduce(size, processes)
        return sent - backward


def buckets(size: float) -> list[float]:
    """Bytes of each bucket of `size` bytes of gradients, in the order in which they are sent."""
    first = min(size, FIRST_BUCKET)
    full, rest = divmod(size - first, BUCKET)
    return [part for part in (first, *[BUCKET] * int(full), rest) if part]

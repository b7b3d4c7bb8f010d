"""GPUs by name, and what a step would take on one at a stated share of its peak: a ceiling, no measurement.

How long processes take to average their gradients, and what of it the backward pass hides: a model, no measurement.

GPUs of one node add up in a ring over its links; then each takes its part of the sum to the other nodes over its own
network card, in a ring's time but for the hops, which are a tree's (NCCL's double binary tree); then back. For b bytes,
n GPUs in a node and m nodes:

    2 (n - 1) / n x b / link + 2 (n - 1) hops  +  2 (m - 1) / m x b / n / network + 2 log2(m) hops

DistributedDataParallel sends gradients in buckets, each as soon as it is full, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

from data_pipeline.files import UserError
from data_pipeline.schema import nearest

LAUNCH_SECONDS = 5e-6  # from one kernel to the next where the processor that starts them sets the pace; an assumption
STATE_TOUCHES = 13  # reads and writes of float32 numbers per parameter: clip 3, AdamW 7, averaged weights 3


@dataclass(frozen=True)
class Gpu:
    """Peaks as the vendor states them, dense (without sparsity)."""

    name: str
    bf16_tflops: float  # tensor cores, float32 accumulation
    float32_tflops: float
    bandwidth: float  # GB/s of its memory
    memory: float  # GB
    link: float  # GB/s each way to the other GPUs of its node: NVLink, or where there is none PCIe 4.0


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312, 19.5, 2039, 80, 300),  # NVIDIA A100 data sheet, 80 GB SXM
        Gpu("l40s", 362, 91.6, 864, 48, 32),  # NVIDIA L40S data sheet
        Gpu("h100", 989, 67, 3350, 80, 450),  # NVIDIA H100 data sheet, SXM; half of what it states with sparsity
        Gpu("h200", 989, 67, 4800, 141, 450),  # NVIDIA H200 data sheet, SXM; as above
        Gpu("b200", 2250, 75, 7700, 180, 900),  # NVIDIA Blackwell data sheet, HGX B200; as above
        Gpu("rtx4090", 165.2, 82.6, 1008, 24, 32),  # NVIDIA Ada GPU Architecture white paper, appendix A
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, in upper or lower case. UserError, with the nearest, where the table has none."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: no GPU {name!r} in the table. {nearest(name.lower(), tuple(GPUS))}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Ceiling:
    """A GPU, and the share of its peaks that is assumed to be reached."""

    gpu: Gpu
    utilisation: float
    bf16: bool

    @property
    def flops(self) -> float:
        """FLOP/s assumed for matrix products."""
        return self.utilisation * 1e12 * (self.gpu.bf16_tflops if self.bf16 else self.gpu.float32_tflops)

    def seconds(self, flops: float, moved_bytes: float, operations: float) -> float:
        """Time of kernels one after another: products at the assumed rate, the others at the memory's bandwidth.

        But never less than it takes to launch them.
        """
        return max(flops / self.flops + moved_bytes / (1e9 * self.gpu.bandwidth), operations * LAUNCH_SECONDS)


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

"""The speed of hardware: data sheets of GPUs, rates measured on this machine, and what follows from them.

Three models use these figures: `AssumedSpeed` and `Interconnect` for `fm plan`, `roofline` for `fm benchmark`. None of
them is a measurement.
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import torch
from torch.utils.benchmark import Timer

from data_pipeline.errors import UserError
from data_pipeline.schema import nearest
from data_pipeline.workers import available_cores
from fm.distributed import precision
from fm.lab.workload import FLOAT_BYTES, Product
from fm.model.attention import linear
from fm.training.runlog import processor_name

LAUNCH_SECONDS = 5e-6  # from one kernel to the next if the host limits the speed; an assumption
STATE_TOUCHES = 13  # float32 numbers read and written per parameter: clip 3, AdamW 7, averaged weights 3


@dataclass(frozen=True)
class Gpu:
    """Peaks that the vendor states, dense (without sparsity)."""

    name: str
    bf16_tflops: float  # tensor cores, float32 accumulation
    float32_tflops: float
    bandwidth: float  # GB/s of its memory
    memory: float  # GB
    link: float  # GB/s each way to the other GPUs of its node: NVLink, or PCIe 4.0 if it has no NVLink


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
    """Return the GPU of this name, in upper or lower case. UserError, with the nearest name, for an unknown GPU."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: no GPU {name!r} in the table. {nearest(name.lower(), tuple(GPUS))}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class AssumedSpeed:
    """A GPU, and the share of its peak that matrix products are assumed to reach."""

    gpu: Gpu
    utilisation: float
    bf16: bool

    @property
    def flops(self) -> float:
        """Return the FLOP/s that matrix products are assumed to reach."""
        return self.utilisation * 1e12 * (self.gpu.bf16_tflops if self.bf16 else self.gpu.float32_tflops)

    def seconds(self, flops: float, moved_bytes: float, operations: float) -> float:
        """Return the time of kernels one after another, but at least the time to launch them.

        Products run at the assumed rate, and all other operations at the memory's bandwidth.
        """
        return max(flops / self.flops + moved_bytes / (1e9 * self.gpu.bandwidth), operations * LAUNCH_SECONDS)


NODE = 8  # GPUs
HOP_SECONDS = 5e-6  # from one GPU to the next, for any number of bytes; an assumption
INFINIBAND = 50.0  # GB/s of a GPU: a card of 400 Gb/s for each
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes that DistributedDataParallel fills before it sends


@dataclass(frozen=True)
class Interconnect:
    """GB/s of each GPU, each way: to the others of its node, and to other nodes.

    GPUs of one node sum their gradients in a ring over its links. Then each GPU sums its part with the other nodes over
    its own network card, in a ring's time but with the hops of a tree (NCCL's double binary tree). Then the sums go
    back. For b bytes, n GPUs in a node and m nodes:

        2 (n - 1) / n x b / link + 2 (n - 1) hops  +  2 (m - 1) / m x b / n / network + 2 log2(m) hops

    DistributedDataParallel collects gradients in buckets. It sends a bucket when the bucket is full, one at a time.
    """

    link: float
    network: float = INFINIBAND

    def all_reduce(self, size: float, processes: int) -> float:
        """Return the seconds until all processes have the sum of `size` bytes. Nodes are as full as possible."""
        local = min(processes, NODE)
        nodes = ceil(processes / local)
        within = 2 * (local - 1) * (size / local / (1e9 * self.link) + HOP_SECONDS)
        between = 2 * (nodes - 1) / nodes * size / local / (1e9 * self.network) + 2 * ceil(log2(nodes)) * HOP_SECONDS
        return within + between

    def after_backward(self, buckets: Sequence[float], backward: float, processes: int) -> float:
        """Return the seconds that the exchange of `buckets`, in bytes, goes on after the backward pass.

        The backward pass takes `backward` seconds and fills the buckets one after the other, at a constant rate.
        """
        filled, sent, whole = 0.0, 0.0, sum(buckets)
        for size in buckets:
            filled += size
            sent = max(sent, backward * (filled / whole)) + self.all_reduce(size, processes)
        return sent - backward


def buckets(size: float) -> list[float]:
    """Return the bytes of each bucket of `size` bytes of gradients, in the order in which they are sent."""
    first = min(size, FIRST_BUCKET)
    full, rest = divmod(size - first, BUCKET)
    return [part for part in (first, *[BUCKET] * int(full), rest) if part]


CEILING_SECONDS = 0.3  # of each measurement, about
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes, far more than caches hold


@dataclass(frozen=True)
class Ceilings:
    """Rates that no step exceeds."""

    flops: Mapping[str, float]  # FLOP/s of a large matrix product: float32, bfloat16, and on some GPUs tf32
    bandwidth: float  # bytes read and written per second
    of: str  # the hardware, and how the rates were found

    def rate(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of products of this dtype."""
        return self.flops["bfloat16" if dtype in (torch.bfloat16, torch.float16) else "float32"]

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Return the least time of a product: arithmetic and memory traffic at the same time."""
        return max(flops / self.rate(dtype), moved / self.bandwidth)


def data_sheet(gpu: Gpu) -> Ceilings:
    """Return the ceilings that the vendor states."""
    rates = {"float32": 1e12 * gpu.float32_tflops, "bfloat16": 1e12 * gpu.bf16_tflops}
    return Ceilings(rates, 1e9 * gpu.bandwidth, f"{gpu.name}, data sheet")


def measure_ceilings(device: torch.device) -> Ceilings:
    """Return the best rates of about a second of large matrix products of random numbers, and of large copies."""
    side, size = SIDE[device.type], COPIED[device.type]

    def product_rate(dtype: torch.dtype) -> float:
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / _best_seconds(lambda: linear(left, right))

    rates = {"float32": product_rate(torch.float32), "bfloat16": product_rate(torch.bfloat16)}
    if device.type == "cuda":
        with precision(torch.bfloat16):
            rates["tf32"] = product_rate(torch.float32)
    source = torch.randn(size // FLOAT_BYTES, device=device)
    target = torch.empty_like(source)
    return Ceilings(rates, 2 * size / _best_seconds(lambda: target.copy_(source)), "measured in this run")


def _best_seconds(work: Callable[[], object]) -> float:
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return float(min(timer.blocked_autorange(min_run_time=CEILING_SECONDS).times))


PARTS = ("linear", "attention", "depthwise", "optimizer")  # of a step: kinds of products, then the optimizer


def roofline(products: Sequence[Product], parameters: int, ceilings: Ceilings) -> dict[str, float]:
    """Return the least seconds of each of a step's PARTS, and how many of all of them are memory `traffic`.

    Each matrix product and convolution of both passes takes the longer of its arithmetic, at the ceiling of its dtype,
    and of reading its operands and writing its results once. All other operations of the passes are free, as if fused
    with their neighbors. Clipping, AdamW and averaged weights take what they read and write.
    """
    seconds = dict.fromkeys((*PARTS, "traffic"), 0.0)
    for product in products:
        least = ceilings.seconds(product.flops, product.bytes, product.dtype)
        seconds[product.kind] += least
        seconds["traffic"] += least if least > product.flops / ceilings.rate(product.dtype) else 0.0
    seconds["optimizer"] = STATE_TOUCHES * FLOAT_BYTES * parameters / ceilings.bandwidth
    seconds["traffic"] += seconds["optimizer"]
    return seconds


def device_name(device: str) -> str:
    """Return the name of the GPU, or the CPU's number of threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def describe_machine(device: str) -> dict[str, Any]:
    """Return this machine's device, cores, load and versions, as JSON."""
    found = {
        "device": device_name(device),
        "cpu": processor_name(),
        "cores": available_cores(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9}
    return found

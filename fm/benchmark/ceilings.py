"""What a machine can do at most: matrix products of a dtype, and memory traffic; measured, or as data sheets say."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fm.nn.linear import linear
from fm.planning.gpus import Gpu
from fm.runtime import products_in_tf32

SECONDS = 0.3  # of each measurement, about
LEAST = 5  # times that each is taken
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes: far more than caches hold


@dataclass(frozen=True)
class Ceilings:
    """Rates that no step exceeds."""

    flops: Mapping[str, float]  # FLOP/s of a large matrix product: float32, bfloat16, and on some GPUs tf32
    bandwidth: float  # bytes read and written per second
    of: str  # whose, and how they were found

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The least time of a product of tensors of `dtype`: arithmetic and memory traffic at the same time."""
        return max(flops / self.rate(dtype), moved / self.bandwidth)

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of products of this dtype."""
        return self.flops["bfloat16" if dtype in (torch.bfloat16, torch.float16) else "float32"]


def data_sheet(gpu: Gpu) -> Ceilings:
    """The ceilings that the vendor states."""
    rates = {"float32": 1e12 * gpu.float32_tflops, "bfloat16": 1e12 * gpu.bf16_tflops}
    return Ceilings(rates, 1e9 * gpu.bandwidth, f"{gpu.name}, data sheet")


def measure_ceilings(device: torch.device) -> Ceilings:
    """The best of a second of large matrix products, on random numbers, and large copies."""
    side = SIDE[device.type]
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rates[name] = 2 * side**3 / _product_seconds(side, dtype, device)
    if device.type == "cuda":
        with products_in_tf32(True):
            rates["tf32"] = 2 * side**3 / _product_seconds(side, torch.float32, device)
    source = torch.randn(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * COPIED[device.type] / _best(lambda: target.copy_(source), device)
    return Ceilings(rates, copied, "measured in this run")


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return _best(lambda: linear(left, right), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the least of many."""
    work()  # where memory is touched for the first time
    times: list[float] = []
    while len(times) < LEAST or sum(times) < SECONDS:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

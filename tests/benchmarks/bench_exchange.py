"""Compare settings of DistributedDataParallel: time of a step, time of the exchange, and the part that backward hides.

    python tests/benchmarks/bench_exchange.py [--grid 64] [--rounds 4] [--steps 6] [key=value ...]

Two gloo processes of one thread each train the model of recipes/fm_pretrain.yaml, one window each of random data, of
two datasets in turn: forward, backward, clip, AdamW. Every row has its own copy of the model. Rows take turns, in an
order that rotates. At the end all rows that exchange gradients must have the same bits on both processes.

    step, CPU      of one process: median over steps, and the mean in CPU seconds, which other load disturbs less
    exchange       from a full bucket to the return of its mean, the union over a step's buckets
    after backward the part of the exchange after the last bucket is full, when nothing is left to compute; median
    gradients      the memory of all gradients and buckets

Two processes on two cores compute the exchange themselves, so hiding it gains nothing here. A row shows how much is
hidden. It does not show the gain on GPUs, whose copy engines and links work at the same time as the backward pass.
"""

import argparse
import copy
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fm.config import load_recipe
from fm.lab.workload import read_workload
from fm.training.objective import Unroll

PROCESSES = 2
DATASETS = ("shear_flow", "gray_scott_reaction_diffusion")
TORCH = {"find_unused_parameters": True}
WAYS: dict[str, dict[str, Any] | None] = {  # None: no exchange
    "no exchange": None,
    "as torch has it": TORCH,
    "gradient_as_bucket_view": {**TORCH, "gradient_as_bucket_view": True},
    "no broadcast_buffers": {**TORCH, "broadcast_buffers": False},
    "both": {**TORCH, "gradient_as_bucket_view": True, "broadcast_buffers": False},
    "both, buckets of 5 MB": {**TORCH, "gradient_as_bucket_view": True, "broadcast_buffers": False, "bucket_cap_mb": 5},
    "both, one bucket": {**TORCH, "gradient_as_bucket_view": True, "broadcast_buffers": False, "bucket_cap_mb": 100},
}


class Way:
    """A copy of the model under some settings, its optimizer, and the times of its exchanges."""

    def __init__(self, objective: Unroll, settings: dict[str, Any] | None) -> None:
        self.objective = copy.deepcopy(objective)
        self.wrapped = DistributedDataParallel(self.objective, **(settings or TORCH))
        self.exchanges = settings is not None
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4)
        self.full: list[float] = []  # when each bucket of this step was full
        self.back: list[float] = []  # when its mean had come back
        self.rows: list[tuple[float, float, float, float]] = []  # of each step: seconds, CPU, exchange, after backward
        self.buckets = self.bytes = 0
        self._buffers: dict[int, int] = {}  # storage -> bytes
        self.wrapped.register_comm_hook(None, self._exchange)

    def _exchange(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Exchange a bucket as torch does, and record the times at both ends."""
        self.full.append(time.perf_counter())
        self._hold(bucket.buffer())
        summed = dist.all_reduce(bucket.buffer().div_(PROCESSES), async_op=True)
        return summed.get_future().then(self._came_back)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._buffers[storage.data_ptr()] = storage.nbytes()

    def _came_back(self, future: torch.futures.Future[list[Tensor]]) -> Tensor:
        self.back.append(time.perf_counter())
        return future.value()[0]

    def step(self, inputs: dict[str, Any]) -> None:
        """Take a step and keep its times."""
        self.full, self.back = [], []
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        with nullcontext() if self.exchanges else self.wrapped.no_sync():
            self.wrapped(**inputs)["loss"].backward()
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                self._hold(parameter.grad)
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        after = max(self.back) - max(self.full) if self.back else 0.0
        self.rows.append((seconds, cpu, union(list(zip(self.full, self.back, strict=True))), after))
        self.buckets, self.bytes = len(self.full), sum(self._buffers.values())
        self._buffers.clear()

    def digest(self) -> str:
        """Return the digest of all parameters."""
        parameters = (parameter.detach().numpy().tobytes() for parameter in self.objective.parameters())
        return hashlib.sha256(b"".join(parameters)).hexdigest()[:12]


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Return the seconds in at least one of the spans (begin, end), which are sorted by their begin."""
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of recipes/fm_pretrain.yaml, such as model.depth=4")
    parser.add_argument("--grid", type=int, default=64, help="points along a side (default 64)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of each row in a round (default 6)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (options, f"{folder}/rendezvous"), nprocs=PROCESSES)


def process(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "fm_pretrain.yaml", options.overrides)
    model = read_workload(recipe).model()
    objective = Unroll(model, recipe.loss)
    ways = {name: Way(objective, settings) for name, settings in WAYS.items()}
    batches = [random_inputs(objective, name, options.grid, rank) for name in DATASETS]
    for way in ways.values():
        way.step(batches[0])
        way.step(batches[1])
        way.rows.clear()
    names = list(ways)
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            for step in range(options.steps):
                ways[name].step(batches[step % len(batches)])
    check_bits(ways)
    if rank == 0:
        report(ways, model.num_parameters(), options)
    dist.destroy_process_group()


def random_inputs(objective: Unroll, dataset: str, grid: int, rank: int) -> dict[str, Any]:
    """Return one window of noise."""
    generator = torch.Generator().manual_seed(rank)
    spec = objective.model.specs[dataset]
    fields = torch.randn(1, 2, len(spec.state_channels), grid, grid, generator=generator)
    constants = torch.randn(1, len(spec.constant_channels), grid, grid, generator=generator)
    return {"fields": fields, "constants": constants, "forced": torch.ones(1, 1, dtype=torch.bool), "dataset": dataset}


def check_bits(ways: dict[str, Way]) -> None:
    """Raise SystemExit if rows or processes differ."""
    mine = {name: way.digest() for name, way in ways.items() if way.exchanges}
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, mine)
    if len({digest for digests in everyone for digest in digests.values()}) > 1:
        raise SystemExit(f"different bits: {everyone}")


def report(ways: dict[str, Way], parameters: int, options: argparse.Namespace) -> None:
    print(f"{parameters:,} parameters, {4e-6 * parameters:.1f} MB of gradients; a window of {options.grid}^2 a process")
    print(f"{options.rounds} x {options.steps} steps of each row, load {os.getloadavg()[0]:.1f}\n")
    print("| settings | buckets | gradients, MB | step, ms | CPU, ms | exchange, ms | after backward, ms | hidden |")
    print("|:---|---:|---:|---:|---:|---:|---:|---:|")
    for name, way in ways.items():
        seconds, cpu, exchange, after = (list(column) for column in zip(*way.rows, strict=True))
        cells = [str(way.buckets), f"{way.bytes / 1e6:.1f}", f"{1e3 * median(seconds):.0f}", f"{1e3 * mean(cpu):.0f}"]
        cells += [f"{1e3 * median(exchange):.1f}", f"{1e3 * median(after):.1f}"]
        cells.append(f"{100 * (1 - median(after) / median(exchange)):.0f} %" if way.exchanges else "")
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nall rows that exchange gradients have the same bits, on both processes")


if __name__ == "__main__":
    main()

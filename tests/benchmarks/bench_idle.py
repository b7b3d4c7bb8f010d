"""Measure how long two processes wait for each other in a step, by the way its draws are divided among them.

    python tests/benchmarks/bench_idle.py [--shards SHARDS] [--steps 40] [--batch 16] [--draws 4] [--repeats 3]

Two gloo processes of one thread each run forward and backward of the quickstart's model over their windows of the same
steps, by `global`, `per_rank` and the naive `whole`: draw d goes undivided to process d modulo 2. No gradients are
exchanged. Each step ends at a barrier, where the faster process waits. The ways take turns, in an order that rotates.
With draws of an odd number of windows (--draws 16), `global` is left out, because it cannot halve them. With an even
number, `per_rank` halves them as `global` does. Without --shards, mini-Well shards are made first, in a temporary
folder.

    idle          seconds at the barrier / all seconds, of both processes; spread over repetitions in brackets
    by CPU time   1 - mean / longest process, summed over steps, in CPU seconds, which other load disturbs less
    by tokens     the same in tokens, which is what `per_rank` shares out
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from data_pipeline.miniwell.generate import PRESETS, simulate
from data_pipeline.registry import load_registry
from data_pipeline.shards.build import build_shards
from data_pipeline.windows.division import WAYS, Division, MicroBatch
from data_pipeline.windows.loader import open_readers, scheduled_batches, sources
from data_pipeline.windows.schedule import Schedule
from fm.config import load_recipe
from fm.datasets import dataset_specs
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import Unroll

PROCESSES = 2
BUSY, WAITED, CPU, TOKENS, PIECES = range(5)  # what is recorded of each step


class WholeDraws(Division):
    """Gives each draw undivided to one process, in turn."""

    def __init__(self, schedule: Schedule, rank: int, draws: int) -> None:
        super().__init__(schedule, rank, PROCESSES, draws, "per_rank")
        self.first = rank

    def micro_batches(self, step: int) -> list[MicroBatch]:
        mine = range(step * self.draws + self.first, (step + 1) * self.draws, PROCESSES)
        return [MicroBatch(index, np.arange(self.schedule.batch)) for index in mine]


class Bench:
    """One process: its model, its windows, and its times."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
        assert recipe.model is not None
        self.readers = open_readers(options.shards, None, "train")
        self.lengths = {name: recipe.window_length(name) for name in self.readers}
        specs = dataset_specs(self.readers, load_registry())
        model = WaveLiTFM(recipe.model, specs, context=recipe.data.context)
        self.objective = Unroll(model, recipe.loss)
        schedule = Schedule(sources(self.readers, self.lengths), options.batch // options.draws, seed=0)
        ways = [way for way in WAYS if way != "global" or schedule.batch % PROCESSES == 0]
        self.divisions = {way: Division(schedule, rank, PROCESSES, options.draws, way) for way in ways}
        self.divisions["whole"] = WholeDraws(schedule, rank, options.draws)

    def run(self, way: str, start: int, stop: int) -> torch.Tensor:
        """Take the steps start, ... stop - 1; return BUSY to PIECES of each, (steps, 5)."""
        division, record = self.divisions[way], []
        batches = scheduled_batches(self.readers, division, self.lengths, start, stop)
        dist.barrier()
        for step in range(start, stop):
            began, cpu, tokens, pieces = time.perf_counter(), time.process_time(), 0, division.micro_batches(step)
            for piece in pieces:
                batch = next(batches)
                forced = torch.ones(len(batch.fields), 1, dtype=torch.bool)
                self.objective(batch.fields, batch.constants, forced, batch.dataset)["loss"].backward()
                tokens += len(piece.places) * division.schedule.source(piece.draw).tokens
            self.objective.zero_grad(set_to_none=True)
            done, used = time.perf_counter(), time.process_time() - cpu
            dist.barrier()
            record.append([done - began, time.perf_counter() - done, used, tokens, len(pieces)])
        return torch.tensor(record, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, help="shards that are there (default: make some)")
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="which to make (default mini)")
    parser.add_argument("--steps", type=int, default=40, help="of each way and repetition (default 40)")
    parser.add_argument("--warm-up", type=int, default=8, help="steps of each way before (default 8)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="windows of a step (default 16)")
    parser.add_argument("--draws", type=int, default=4, help="draws of a step (default 4)")
    options = parser.parse_args()
    if options.batch % options.draws or options.batch < PROCESSES:
        parser.error(f"--batch: expected a multiple of {options.draws} draws, and {PROCESSES} windows or more")
    with tempfile.TemporaryDirectory() as folder:
        if options.shards is None:
            options.shards = Path(folder) / "shards"
            simulate(Path(folder) / "well", options.preset)
            build_shards(Path(folder) / "well", options.shards)
        torch.multiprocessing.spawn(process, (options, f"{folder}/rendezvous"), nprocs=PROCESSES)


def process(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    bench = Bench(options, rank)
    ways = list(bench.divisions)
    for way in ways:
        bench.run(way, options.steps, options.steps + options.warm_up)
    barrier = bare_barrier()
    runs: dict[str, list[torch.Tensor]] = {way: [] for way in ways}
    for repeat in range(options.repeats):
        turn = repeat % len(ways)
        for way in ways[turn:] + ways[:turn]:
            runs[way].append(bench.run(way, 0, options.steps))
    both = {way: gather(torch.stack(runs[way])) for way in ways}  # (2, repeats, steps, 5)
    if rank == 0:
        report(both, options, barrier, bench.divisions["whole"])
    dist.destroy_process_group()


def bare_barrier(times: int = 200) -> float:
    """Return the median seconds of a barrier that all processes reach at once."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def gather(mine: torch.Tensor) -> torch.Tensor:
    everyone = [torch.empty_like(mine) for _ in range(PROCESSES)]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


def report(both: dict[str, torch.Tensor], options: argparse.Namespace, barrier: float, division: Division) -> None:
    datasets = [len({draw.dataset for draw in division.draws_of(step)}) for step in range(options.steps)]
    print(f"{PROCESSES} processes, {options.steps} steps of {options.batch} windows in {options.draws} draws", end=" ")
    print(f"({statistics.mean(datasets):.1f} datasets a step), {options.repeats} repetitions of each way")
    print(f"load {os.getloadavg()[0]:.1f}; a barrier at which nobody is late: {1e3 * barrier:.2f} ms\n")
    print("| way | pieces per process | step, s | idle | by CPU time | by tokens |\n|:-|-:|-:|-:|-:|-:|")
    for way, record in both.items():
        steps = (record[..., BUSY] + record[..., WAITED]).mean(dim=(0, 2)).tolist()  # of each repetition
        idle = (record[..., WAITED].sum(dim=(0, 2)) / record[..., [BUSY, WAITED]].sum(dim=(0, 2, 3))).tolist()
        cells = [f"{record[..., PIECES].mean():.1f}", spread(steps, 1, ".3f"), spread(idle, 100, ".1f", " %")]
        cells += [spread(behind(record[..., column]).tolist(), 100, ".1f", " %") for column in (CPU, TOKENS)]
        print(f"| {way} | {' | '.join(cells)} |")


def behind(amounts: torch.Tensor) -> torch.Tensor:
    """Return 1 - mean / longest of processes, summed over steps: (processes, repeats, steps) to (repeats,)."""
    return 1 - amounts.mean(dim=0).sum(dim=-1) / amounts.amax(dim=0).sum(dim=-1)


def spread(values: list[float], scale: float, form: str, unit: str = "") -> str:
    """Return the median, the lowest and the highest value as text."""
    median, low, high = (format(scale * value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{median}{unit}" if low == high else f"{median}{unit} ({low} to {high})"


if __name__ == "__main__":
    main()

"""How long training waits for data, with the trainer's own loader and several numbers of workers.

On a CPU a sleep of a step's length takes the place of each step. On a GPU real steps are taken, each to its end.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median

import torch
from accelerate import Accelerator

from data_pipeline.progress import progress_bar
from data_pipeline.registry import load_registry
from data_pipeline.tables import digits, markdown
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import scheduled_batches, sources
from data_pipeline.windows.reader import Batch
from fm.config import Recipe
from fm.datasets import build_model, open_split
from fm.training.mixing import Mixing
from fm.training.state import TrainingState
from fm.training.step import train_step

WORKERS = (0, 1, 2, 4)
WARM_UP_STEPS = 5
AIM = 0.02  # share of the time that training may wait


@dataclass(frozen=True)
class DataWait:
    """What was measured with one number of workers. The fields are the keys of the JSON file."""

    workers: int
    steps: int
    waited: float  # share of the time in which training waits for data
    median_wait: float  # seconds for a batch; far below the mean if the machine stalls now and then
    bytes_per_s: float
    windows_per_s: float
    cores: float  # that this process kept busy; on a CPU only the loader works


class ShardLoader:
    """The shards of a recipe's training split, read as training reads them."""

    def __init__(self, recipe: Recipe, shards: str, step_seconds: float) -> None:
        """Open the shards. UserError if a dataset of the recipe has none."""
        self.recipe = replace(recipe, data=replace(recipe.data, shards=shards))
        self.step_seconds = step_seconds
        self._registry = load_registry(recipe.data.registry)
        self._readers = open_split(self.recipe, self._registry, "train")
        self._lengths = {name: recipe.window_length(name) for name in self._readers}
        train, draw = recipe.train, recipe.sampling.draw
        schedule = Mixing(self.recipe, sources(self._readers, self._lengths)).schedule
        self._division = Division(schedule, 0, 1, train.draws, draw, train.micro_batch)

    def pace(self, device: str) -> str:
        """Return what is done with each step's batches, in words."""
        if device == "cuda":
            return "with real steps, each to its end"
        return f"with a consumer that takes {1e3 * self.step_seconds:g} ms a step"

    def measure(self, accelerator: Accelerator, seconds: float) -> list[DataWait]:
        """Measure each number of workers for about `seconds`, with a progress bar."""
        steps = max(WARM_UP_STEPS, round(seconds / max(self.step_seconds, 1e-3)))
        state = None
        if accelerator.device.type == "cuda":
            model = build_model(self.recipe, self._readers, self._registry)
            state = TrainingState(self.recipe, model, accelerator, None)
        bar = progress_bar(WORKERS, desc="data wait", unit="way", leave=False)
        return [self._measure(accelerator, state, workers, steps) for workers in bar]

    def _measure(self, accelerator: Accelerator, state: TrainingState | None, workers: int, steps: int) -> DataWait:
        loader = scheduled_batches(
            self._readers,
            self._division,
            length=self._lengths,
            start=0,
            stop=WARM_UP_STEPS + steps,
            workers=workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        found: list[tuple[float, int, int]] = []
        batches = _timed(loader, found)
        started, started_cpu = time.perf_counter(), time.process_time()
        for step in range(WARM_UP_STEPS + steps):
            if step == WARM_UP_STEPS:
                found.clear()
                started, started_cpu = time.perf_counter(), time.process_time()
            if state is None:
                for _ in islice(batches, len(self._division.micro_batches(step))):
                    pass
                time.sleep(self.step_seconds)
            else:
                train_step(self.recipe, state, self._division, batches, accelerator, step)
                torch.cuda.synchronize(accelerator.device)
        spent = time.perf_counter() - started
        waits, sizes, windows = zip(*found, strict=True)
        return DataWait(
            workers=workers,
            steps=steps,
            waited=sum(waits) / spent,
            median_wait=median(waits),
            bytes_per_s=sum(sizes) / spent,
            windows_per_s=sum(windows) / spent,
            cores=(time.process_time() - started_cpu) / spent,
        )


def _timed(batches: Iterator[Batch], found: list[tuple[float, int, int]]) -> Iterator[Batch]:
    """Yield the batches; append to `found` for each the seconds of waiting, its bytes and its number of windows."""
    while True:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        found.append((waited, batch.fields.nbytes + batch.constants.nbytes, len(batch.windows)))
        yield batch


def data_wait_text(waits: Sequence[DataWait], pace: str) -> str:
    """Return a table with a row for each number of workers, under a line with the aim."""
    head = ["workers", "waited %", "median ms", "MB/s", "windows/s", "cores busy"]
    rows = []
    for one in waits:
        numbers = 100 * one.waited, 1e3 * one.median_wait, one.bytes_per_s / 1e6, one.windows_per_s, one.cores
        rows.append([str(one.workers), *map(digits, numbers)])
    return f"Data wait, {pace}; the aim is below {AIM:.0%}\n\n{markdown(head, rows)}"

"""Whether shards are read fast enough: the trainer's loader feeds a consumer, which says how long it waited.

On a CPU the consumer sleeps as long as a step of the aim takes; on a GPU it takes real steps, each to its end.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median

import torch
from accelerate import Accelerator
from tqdm import tqdm

from data_pipeline.cards.registry import load_registry
from data_pipeline.windows.batch import Batch
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import scheduled_batches, sources
from fm.planning.tables import digits
from fm.scores.formats import markdown
from fm.settings import Recipe
from fm.training.exercise import take_step
from fm.training.inputs import build_model, open_split
from fm.training.mixing import Mixing
from fm.training.state import TrainingState

WORKERS = (0, 1, 2, 4)
WARM_UP = 5  # steps that do not count
AIM = 0.02  # share of the time that may be waited


@dataclass(frozen=True)
class Fed:
    """What so many workers gave."""

    workers: int
    steps: int
    waited: float  # share of the time that the consumer waited for data
    median_wait: float  # seconds for a batch; far below the mean where it is the machine that stalls, now and then
    bytes_per_s: float
    windows_per_s: float
    cores: float  # that this process kept busy, which on a CPU are the loader's alone


class Feed:
    """The shards of a recipe's training split, as training reads them.

    UserError where a dataset of the recipe has none.
    """

    def __init__(self, recipe: Recipe, shards: str, step_seconds: float) -> None:
        self.recipe = replace(recipe, data=replace(recipe.data, shards=shards))
        self.step_seconds = step_seconds
        self._registry = load_registry(recipe.data.registry)
        self._readers = open_split(self.recipe, self._registry, "train")
        self._lengths = {name: recipe.window_length(name) for name in self._readers}
        train, way = recipe.train, recipe.sampling.draw
        schedule = Mixing(self.recipe, sources(self._readers, self._lengths)).schedule
        self._division = Division(schedule, 0, 1, train.draws, way, train.micro_batch)

    def pace(self, device: str) -> str:
        """What the consumer does with a batch, in words."""
        if device == "cuda":
            return "with real steps, each to its end"
        return f"with a consumer that takes {1e3 * self.step_seconds:g} ms a step"

    def measure(self, accelerator: Accelerator, seconds: float) -> list[Fed]:
        """Each number of workers for about so many seconds, with a progress bar."""
        steps = max(WARM_UP, round(seconds / max(self.step_seconds, 1e-3)))
        state = None
        if accelerator.device.type == "cuda":
            model = build_model(self.recipe, self._readers, self._registry)
            state = TrainingState(self.recipe, model, accelerator, None)
        bar = tqdm(WORKERS, desc="feed", unit="way", leave=False)
        return [self._feed(accelerator, state, workers, steps) for workers in bar]

    def _feed(self, accelerator: Accelerator, state: TrainingState | None, workers: int, steps: int) -> Fed:
        batches = scheduled_batches(
            self._readers,
            self._division,
            length=self._lengths,
            start=0,
            stop=WARM_UP + steps,
            workers=workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        meter = _Meter(batches)
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                meter.reset()
            if state is None:
                for _ in islice(meter, len(self._division.pieces(step))):
                    pass
                time.sleep(self.step_seconds)
            else:
                state.step = step
                take_step(self.recipe, state, self._division, accelerator, meter)
                torch.cuda.synchronize(accelerator.device)
        spent, computed = time.perf_counter() - meter.begun, time.process_time() - meter.begun_cpu
        speed = (meter.bytes / spent, meter.windows / spent)
        return Fed(workers, steps, sum(meter.waits) / spent, median(meter.waits), *speed, computed / spent)


class _Meter(Iterator[Batch]):
    """Hands batches on; notes what was waited for them, and what they hold."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.reset()

    def reset(self) -> None:
        self.begun, self.begun_cpu = time.perf_counter(), time.process_time()
        self.waits: list[float] = []  # seconds
        self.bytes = self.windows = 0

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waits.append(time.perf_counter() - started)
        self.bytes += batch.fields.nbytes + batch.constants.nbytes
        self.windows += len(batch.windows)
        return batch


def feed_text(found: Sequence[Fed], pace: str) -> str:
    """A table of the ways, and whether one keeps the aim."""
    head = ["workers", "waited %", "median ms", "MB/s", "windows/s", "cores busy"]
    body = []
    for one in found:
        waits = (100 * one.waited, 1e3 * one.median_wait)
        body.append([str(one.workers), *map(digits, (*waits, one.bytes_per_s / 1e6, one.windows_per_s, one.cores))])
    return f"Data wait, {pace}; the aim is below {AIM:.0%}\n\n{markdown(head, body)}"

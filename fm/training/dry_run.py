"""Dry runs: training steps on random data, for the time and the memory of a step.

`fm plan`, `fm benchmark` and the memory check before a finetuning use them.
"""

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator

from data_pipeline.registry import PATCH
from data_pipeline.windows.division import Division, MicroBatch
from data_pipeline.windows.reader import Batch
from data_pipeline.windows.schedule import Schedule, Source
from fm.config import Recipe
from fm.model.spec import DatasetSpec
from fm.training.state import TrainingState
from fm.training.step import PHASES, train_step

SEED = 0


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one step on this process, by phase."""

    data: float  # the copy of the windows to the device, and train.augment
    forward: float
    backward: float
    optimizer: float  # gradient norm, exchange of the metrics, clipping, update, averaged weights
    whole: float  # from the beginning of the first phase to the end of the last


class StepTimer:
    """Records when the phases of a step end on the device. The host waits for the device only in `read`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._phases: list[str] = []
        self._marks: list[Any] = [self._now()]  # seconds, on a GPU events

    def end_phase(self, phase: str) -> None:
        """Add the time since the last call, or since the timer was made, to `phase`, one of PHASES."""
        self._phases.append(phase)
        self._marks.append(self._now())

    def read(self) -> StepSeconds:
        """Wait for the last phase and return the seconds of each phase. Raises KeyError for an unknown phase."""
        times = self._marks
        if self._on_gpu:
            times[-1].synchronize()
            times = [1e-3 * times[0].elapsed_time(event) for event in times]
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, (begin, end) in zip(self._phases, pairwise(times), strict=True):
            seconds[phase] += end - begin
        return StepSeconds(**seconds, whole=times[-1] - times[0])

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class DryRun:
    """Training steps on random data of one dataset's shapes, the same in each; unrolls have their full length."""

    def __init__(self, recipe: Recipe, spec: DatasetSpec, grid: tuple[int, int], accelerator: Accelerator) -> None:
        """Make the windows of `recipe` (see `resized`) on `grid` (H, W)."""
        self.recipe, self._accelerator, self._step = recipe, accelerator, recipe.train.steps - 1
        train = recipe.train
        source = Source(spec.name, train.batch, grid[0] * grid[1] // PATCH, (train.batch,))
        schedule = Schedule([source], train.batch, seed=SEED)
        rank, processes = accelerator.process_index, accelerator.num_processes
        self._division = Division(schedule, rank, processes, train.draws, micro_batch=train.micro_batch)
        frames = recipe.window_length(spec.name)
        self.batches = [self._random(one, spec, frames, grid) for one in self._division.micro_batches(self._step)]

    def step(self, state: TrainingState, update: bool = True) -> StepTimer:
        """Take the step without waiting for the device; with `update`, noise moves the weights. Collective."""
        timer = StepTimer(self._accelerator.device)
        train_step(
            self.recipe,
            state,
            self._division,
            iter(self.batches),
            self._accelerator,
            self._step,
            skip_update=lambda metrics: not update,
            end_phase=timer.end_phase,
        )
        return timer

    def _random(self, micro_batch: MicroBatch, spec: DatasetSpec, frames: int, grid: tuple[int, int]) -> Batch:
        windows, numbers = len(micro_batch.places), torch.Generator().manual_seed(SEED)
        fields = torch.randn(windows, frames, len(spec.state_channels), *grid, generator=numbers)
        constants = torch.randn(windows, len(spec.constant_channels), *grid, generator=numbers)
        batch = Batch(spec.name, fields, constants, torch.arange(windows), micro_batch.draw)
        return batch.pin_memory() if self._accelerator.device.type == "cuda" else batch


def resized(recipe: Recipe, windows: int, draws: int = 1) -> Recipe:
    """Return the recipe with `windows` windows in each of `draws` draws."""
    return replace(recipe, train=replace(recipe.train, global_batch=windows * draws, draws=draws))

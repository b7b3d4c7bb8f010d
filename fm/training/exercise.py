"""The trainer's own step, taken again and again on random data of a dataset's grid, in timed phases.

    data        the copy of the step's windows to the device
    forward     the objective
    backward    its gradient
    optimiser   clip, AdamW, averaged weights

A step has the first three once for each of its pieces (data_pipeline/windows/schedule.py).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from data_pipeline.registry import PATCH
from data_pipeline.windows.reader import Batch
from data_pipeline.windows.schedule import Division, MicroBatch, Schedule, Source
from fm.config import FinetuneSettings, Recipe
from fm.model.spec import DatasetSpec
from fm.model.surrogate import Surrogate
from fm.training.state import TrainingState
from fm.training.step import step_gradient

PHASES = ("data", "forward", "backward", "optimiser")
SEED = 0  # of the data


@dataclass(frozen=True)
class StepSeconds:
    """Of one step on this process."""

    data: float
    forward: float
    backward: float
    optimiser: float
    whole: float  # from the beginning of the first phase to the end of the last


class Clock:
    """Notes when phases end, in the order in which the device works; nobody waits for the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._phases: list[str] = []
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._note()

    def mark(self, phase: str) -> None:
        """What came since the last mark, or since the clock was made, belongs to `phase`, one of PHASES."""
        self._phases.append(phase)
        self._note()

    def read(self) -> StepSeconds:
        """Seconds of each phase and of all; waits until the device has done the last of them."""
        if self._on_gpu:
            self._events[-1].synchronize()
            times = [1e-3 * self._events[0].elapsed_time(event) for event in self._events]
        else:
            times = self._times
        spent = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in zip(self._phases, times[:-1], times[1:], strict=True):
            spent[phase] += end - begin
        return StepSeconds(**spent, whole=times[-1] - times[0])

    def _note(self) -> None:
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(time.perf_counter())


def take_step(
    recipe: Recipe,
    state: TrainingState,
    division: Division,
    accelerator: Accelerator,
    batches: Iterator[Batch],
    mark: Callable[[str], None] = lambda phase: None,
) -> None:
    """The step after `state.step` as the trainer takes it, but for what it judges and records. Collective."""
    parallel = state.parallel
    parallel.let_rest(tuple(draw.dataset for draw in division.draws_of(state.step)))
    step_gradient(recipe, state, division, accelerator, batches, mark)
    parallel.clip(recipe.train.clip)
    parallel.move()
    state.ema.update(parallel.shards(), state.step)
    parallel.forget()


class Exercise:
    """A step that draws one dataset, with its windows: standard normal numbers, the same each time it is taken.

    Processes share it as they share a step of training.
    """

    def __init__(self, recipe: Recipe, spec: DatasetSpec, grid: tuple[int, int], accelerator: Accelerator) -> None:
        """The recipe's windows and model steps, see `sized`, on `grid` (H, W)."""
        self.recipe, self.spec, self.grid = recipe, spec, grid
        self._accelerator = accelerator
        train, (height, width) = recipe.train, grid
        source = Source(spec.name, train.batch, height * width // PATCH, (train.batch,))
        rank, processes = accelerator.process_index, accelerator.num_processes
        schedule = Schedule([source], train.batch, seed=SEED)
        self._division = Division(schedule, rank, processes, train.draws, micro_batch=train.micro_batch)
        step = last_step(recipe)
        self.batches = [self._batch(piece) for piece in self._division.micro_batches(step)]

    def step(self, state: TrainingState) -> Clock:
        """Take the step, without waiting for the device. The weights move, by noise. Collective."""
        clock = Clock(self._accelerator.device)
        take_step(self.recipe, state, self._division, self._accelerator, self._fetch(clock), clock.mark)
        clock.mark("optimiser")
        return clock

    def _fetch(self, clock: Clock) -> Iterator[Batch]:
        for batch in self.batches:
            moved = batch.to(self._accelerator.device, non_blocking=True)
            clock.mark("data")
            yield moved

    def _batch(self, piece: MicroBatch) -> Batch:
        spec, windows = self.spec, len(piece.places)
        numbers = torch.Generator().manual_seed(SEED)
        shape = (self.recipe.window_length(spec.name), len(spec.state_channels), *self.grid)
        fields = torch.randn(windows, *shape, generator=numbers)
        constants = torch.randn(windows, len(spec.constant_channels), *self.grid, generator=numbers)
        batch = Batch(spec.name, fields, constants, torch.arange(windows), piece.draw)
        return batch.pin_memory() if self._accelerator.device.type == "cuda" else batch


def exercise_state(recipe: Recipe, model: Surrogate, accelerator: Accelerator) -> TrainingState:
    """A new training state at the last step of the recipe, where unrolls have their full length. Collective."""
    state = TrainingState(recipe, model, accelerator, None)
    state.step = last_step(recipe)
    return state


def last_step(recipe: Recipe) -> int:
    """The step before the recipe's last, counted from 0."""
    return recipe.train.steps - 1


def sized(recipe: Recipe, windows: int, draws: int = 1, calls: int | None = None) -> Recipe:
    """The recipe with so many windows in each of the step's draws, and windows of `calls` model steps; None: its own.

    With `calls` all gradients flow, as finetune.objective says, or where there is no such section, through all of them.
    """
    train = replace(recipe.train, global_batch=windows * draws, draws=draws)
    finetune = recipe.finetune
    if calls is not None and (finetune is not None or calls > 1):
        finetune = finetune or FinetuneSettings("", objective="bptt")
        finetune = replace(finetune, unroll_steps=calls, unroll_override={}, unroll_start=None)
    return replace(recipe, train=train, finetune=finetune)

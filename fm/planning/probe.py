"""Seconds of a training step on this machine, measured: a few steps per dataset, on random data of its grid.

A step is the trainer's own (fm/training/exercise.py). Datasets take turns, as they do in training, and the first round,
which is slow, does not count. What would take too long is made smaller, first to one window, then to a grid of half the
sides and so on; its time follows from that of two sizes, on a line in FLOPs, since a part of a step does not grow with
the grid.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from accelerate import Accelerator
from tqdm import tqdm

from data_pipeline.cards.card import PATCH
from fm.cost import forward_passes
from fm.planning.workload import DatasetWork, Workload
from fm.runtime import make_accelerator
from fm.settings import Recipe
from fm.surrogate import MIN_GRID
from fm.training.exercise import Exercise, exercise_state, sized

ROUNDS = 3  # counted steps of each dataset, at least
MOST_ROUNDS = 12
SMALLEST = 32  # longer side of the smallest grid
MEMORY_SHARE = 0.7  # of the machine's, that a step's activations may take


@dataclass(frozen=True)
class Trial:
    """One dataset's step, or a smaller one in its place."""

    work: DatasetWork
    recipe: Recipe
    grid: tuple[int, int]
    smaller_than: float = 1.0  # work of the step over that of the one which is taken

    @property
    def work_done(self) -> float:
        """Tokens x forward passes, to which FLOPs are proportional."""
        height, width = self.grid
        passes = forward_passes(self.recipe.window_length(self.work.name) - 1, self.recipe.finetune)
        return self.recipe.train.global_batch * passes * height * width / PATCH


@dataclass(frozen=True)
class Measured:
    """Seconds of one process's part of a step that draws only this dataset."""

    seconds: float
    steps: int  # counted
    extrapolated: bool  # scaled up from a smaller step
    exchange: float = 0.0  # of the seconds, what the exchange of gradients adds


class Probe:
    """Takes steps of a workload on this machine, with the share of one of `processes`."""

    def __init__(self, workload: Workload, processes: int, kept: Mapping[str, float], memory: float) -> None:
        """`kept` are the bytes of activations per token, by dataset; `memory` is what this machine has."""
        self.recipe = workload.recipe
        self.accelerator: Accelerator = make_accelerator(self.recipe.train.clip)
        self.state = exercise_state(self.recipe, workload.model(), self.accelerator)
        self._works = list(workload.datasets.values())
        self._kept, self._memory = kept, memory
        self._windows = max(1, self.recipe.train.batch // processes)  # of a draw

    def measure(self, seconds: float) -> dict[str, Measured]:
        """The datasets' steps by name, within about `seconds` where the machine allows."""
        started = time.perf_counter()
        limit = seconds / len(self._works) / (1 + ROUNDS)
        rate = self._rate(limit)
        trials = [self._fitting(work, limit * rate) for work in self._works]
        least = {trial.work.name: self._least(trial.work) for trial in trials if trial.smaller_than > 1}
        times: dict[str, list[float]] = {trial.work.name: [] for trial in trials}
        with tqdm(total=MOST_ROUNDS + 1, desc="probe", unit="round", leave=False) as bar:
            for number in range(MOST_ROUNDS + 1):
                left = started + seconds - time.perf_counter()
                if number > ROUNDS and left < sum(taken[-1] for taken in times.values()):
                    break
                for trial in trials:
                    times[trial.work.name].append(self._step(trial))
                bar.update()
        return {trial.work.name: _of_whole(trial, times[trial.work.name][1:], least) for trial in trials}

    def _rate(self, limit: float) -> float:
        """Work per second, of the largest step of the cheapest dataset that seems to take at most `limit` seconds."""
        work = min(self._works, key=lambda work: work.source.tokens)
        rate = 0.0
        for trial in reversed(list(self._smaller(work))):
            seconds = min(self._step(trial), self._step(trial))  # the first of its kind is slow
            rate = trial.work_done / seconds
            if seconds > limit / 2 or not self._fits(trial):
                break
        return rate

    def _least(self, work: DatasetWork) -> tuple[float, float]:
        """Work and seconds of the smallest step."""
        *_, trial = self._smaller(work)
        return trial.work_done, median(self._step(trial) for _ in range(ROUNDS))

    def _fitting(self, work: DatasetWork, most: float) -> Trial:
        """The dataset's step, or the largest of the smaller ones that is at most so much work and fits in memory."""
        whole, *smaller, _ = self._smaller(work)  # the last is the other end of the line
        for trial in (whole, *smaller):
            if trial.work_done <= most and self._fits(trial):
                break
        return replace(trial, smaller_than=whole.work_done / trial.work_done)

    def _fits(self, trial: Trial) -> bool:
        train, (height, width) = trial.recipe.train, trial.grid
        tokens = min(train.batch, train.micro_batch or train.batch) * height * width / PATCH
        return tokens * self._kept[trial.work.name] < MEMORY_SHARE * self._memory

    def _smaller(self, work: DatasetWork) -> Iterator[Trial]:
        """The step itself, then of fewer windows, then of smaller grids."""
        yield self._trial(work, self._windows, self.recipe.train.draws, work.grid)
        grid = work.grid
        yield self._trial(work, 1, 1, grid)
        while max(grid) > SMALLEST:
            grid = _halved(grid[0]), _halved(grid[1])
            yield self._trial(work, 1, 1, grid)

    def _trial(self, work: DatasetWork, windows: int, draws: int, grid: tuple[int, int]) -> Trial:
        return Trial(work, sized(self.recipe, windows, draws), grid)

    def _step(self, trial: Trial) -> float:
        """Take a step; returns its seconds. The weights move, by noise."""
        return Exercise(trial.recipe, trial.work.spec, trial.grid, self.accelerator).step(self.state).read().whole


def _of_whole(trial: Trial, times: Sequence[float], least: Mapping[str, tuple[float, float]]) -> Measured:
    """The step that a trial stands for, of times of the trial and of the smallest step (work, seconds)."""
    seconds = median(times)
    if trial.smaller_than == 1:
        return Measured(seconds, len(times), False)
    work, start = least[trial.work.name]
    slope = max(seconds - start, 0.0) / (trial.work_done - work)
    whole = seconds + slope * (trial.smaller_than - 1) * trial.work_done
    return Measured(whole, len(times), True)


def _halved(side: int) -> int:
    return max(MIN_GRID, side // 4 * 2)

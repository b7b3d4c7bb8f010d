"""Steps of variants and datasets in turn, so that whatever else the machine does meanwhile meets all of them alike.

On a CPU all variants take turns. On a GPU they come one after another, since each would take memory from the others.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from tqdm import tqdm

from data_pipeline.errors import UserError
from fm.planning.workload import Workload
from fm.settings import Recipe
from fm.training.exercise import Exercise, StepSeconds, exercise_state

LEAST = 3  # rounds that count
WARM_UP = {"cpu": 1, "cuda": 3}  # rounds that do not: compilers, allocators, CUDA graphs
TURN = {"cpu": 1, "cuda": 4}  # steps of a dataset at a time, which a GPU takes without a pause between them


@dataclass
class Trial:
    """One dataset under one variant, and what has been measured of it."""

    variant: str
    dataset: str
    recipe: Recipe  # the variant's
    times: list[StepSeconds] = field(default_factory=list)
    memory: float | None = None  # peak bytes of the GPU
    reason: str = ""  # why nothing was measured


def run_trials(
    recipes: Mapping[str, Recipe],
    workload: Workload,
    accelerator: Accelerator,
    seconds: float,
    whatever_it_takes: bool = False,
) -> list[Trial]:
    """Measure variants, each a recipe, for about so many seconds in all.

    Of those that take turns the first is measured, and the others as far as there is time, or `whatever_it_takes`.
    """
    trials = [Trial(name, data, recipe) for name, recipe in recipes.items() for data in workload.datasets]
    groups = [list(recipes)] if accelerator.device.type == "cpu" else [[name] for name in recipes]
    with tqdm(total=round(seconds), desc="benchmark", unit="s", leave=False) as bar:
        for names in filter(None, groups):
            some = [[trial for trial in trials if trial.variant == name] for name in names]
            entrants = _enter(some, workload, accelerator, seconds / len(groups), whatever_it_takes, bar)
            _take_turns(entrants, seconds / len(groups), bar)
            del entrants
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
    return trials


class _Entrant:
    """A variant with a model, an optimiser and averages of its own, and a step of every dataset."""

    def __init__(self, trials: Sequence[Trial], workload: Workload, accelerator: Accelerator) -> None:
        recipe = trials[0].recipe
        self.device = accelerator.device
        self.state = exercise_state(recipe, workload.model(), accelerator)
        works = [workload.datasets[trial.dataset] for trial in trials]
        exercises = [Exercise(recipe, work.spec, work.grid, accelerator) for work in works]
        self.steps = list(zip(trials, exercises, strict=True))

    def warm_up(self) -> float:
        """Steps that do not count; those that cannot be taken leave their reason. Returns seconds of the last round."""
        begun = time.perf_counter()
        for _ in range(WARM_UP[self.device.type]):
            begun = time.perf_counter()
            for trial, exercise in self.steps:
                if not trial.reason:
                    self._try(trial, exercise)
        return time.perf_counter() - begun

    def _try(self, trial: Trial, exercise: Exercise) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            exercise.step(self.state).read()
        except RuntimeError as error:  # out of memory, or no compiler
            trial.reason = _first_line(error)
            self.state.parallel.forget()
            return
        if self.device.type == "cuda":
            trial.memory = float(torch.cuda.max_memory_allocated(self.device))

    def round(self) -> None:
        """A turn of each dataset."""
        for trial, exercise in self.steps:
            if not trial.reason:
                clocks = [exercise.step(self.state) for _ in range(TURN[self.device.type])]
                trial.times.extend(clock.read() for clock in clocks)


def _enter(
    variants: Sequence[Sequence[Trial]],
    workload: Workload,
    accelerator: Accelerator,
    seconds: float,
    whatever_it_takes: bool,
    bar: tqdm,
) -> list[_Entrant]:
    """The variants that can be measured here and for which there is time, warm; the others leave their reason."""
    begun = time.perf_counter()
    entrants: list[_Entrant] = []
    a_round = 0.0  # seconds
    for trials in variants:
        bar.set_postfix_str(trials[0].variant)
        try:
            entrant = _Entrant(trials, workload, accelerator)
        except UserError as error:  # what this device, model or recipe does not allow
            _leave_out(trials, str(error))
            continue
        own = entrant.warm_up() if not entrants or whatever_it_takes or _left(begun, seconds) > LEAST * a_round else 0.0
        if entrants and not whatever_it_takes and _left(begun, seconds) < LEAST * (a_round + own):
            _leave_out(trials, "no time for it within the seconds given")
            continue
        entrants.append(entrant)
        a_round += own
    return entrants


def _take_turns(entrants: Sequence[_Entrant], seconds: float, bar: tqdm) -> None:
    """Rounds of all of them for so many seconds; LEAST at least, but where that takes twice as long, only one."""
    begun, number, a_round, shown = time.perf_counter(), 0, 0.0, bar.n
    while not number or _left(begun, seconds) > (a_round if number >= LEAST else -seconds):
        started = time.perf_counter()
        for entrant in entrants:
            entrant.round()
        number, a_round = number + 1, time.perf_counter() - started
        bar.update(min(shown + int(time.perf_counter() - begun), bar.total) - bar.n)


def _leave_out(trials: Sequence[Trial], reason: str) -> None:
    for trial in trials:
        trial.reason = reason.partition("\n")[0]


def _left(begun: float, seconds: float) -> float:
    return begun + seconds - time.perf_counter()


def _first_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"

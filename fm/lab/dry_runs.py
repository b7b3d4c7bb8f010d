"""Seconds of training steps on this machine, measured by dry runs in turns.

A dry run is the trainer's own step (fm/training/step.py) on random data of a dataset's grid. Datasets take turns, as
they do in training. The first rounds do not count: compilers, allocators and CUDA graphs make them slow.
`SizedDryRuns` is for `fm plan`, `measure_variants` and `profile_step` are for `fm benchmark`.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from data_pipeline.errors import UserError
from data_pipeline.progress import progress_bar
from data_pipeline.registry import PATCH
from data_pipeline.tables import digits, markdown
from fm.config import Recipe
from fm.distributed import make_accelerator
from fm.lab.workload import Workload, WorkloadDataset
from fm.model.surrogate import MIN_GRID
from fm.training.dry_run import DryRun, StepSeconds, resized
from fm.training.flops import forward_passes
from fm.training.state import TrainingState

ROUNDS = 3  # that count, at least
MOST_ROUNDS = 12  # that count, of `SizedDryRuns`
SMALLEST = 32  # longer side of the smallest grid
MEMORY_SHARE = 0.7  # of the machine's memory, that the activations of a dry run may take
WARM_UP = {"cpu": 1, "cuda": 3}  # rounds of `measure_variants` that do not count
TURN = {"cpu": 1, "cuda": 4}  # dry runs of a dataset at a time; a GPU takes them without a pause between them
PROFILED_STEPS = 3
PROFILED_ROWS, NAME_WIDTH = 25, 70  # of the table of kernels


@dataclass(frozen=True)
class StepTime:
    """Seconds of one process's part of a step that draws only one dataset."""

    seconds: float
    extrapolated: bool = False  # from smaller steps
    exchange: float = 0.0  # of the seconds: what the exchange of gradients adds


@dataclass(frozen=True)
class _SizedStep:
    """A dataset's step, or a smaller step in its place."""

    dataset: WorkloadDataset
    recipe: Recipe
    grid: tuple[int, int]

    @property
    def work(self) -> float:
        """Return tokens x forward passes, which FLOPs are proportional to."""
        passes = forward_passes(self.recipe.unroll_steps(self.dataset.name), self.recipe.finetune)
        return self.recipe.train.global_batch * passes * self.grid[0] * self.grid[1] / PATCH


class SizedDryRuns:
    """Dry runs of a workload with the windows of one of `processes` processes.

    A step that would take too long or too much memory is replaced by a smaller one: of one window, then of half the
    sides, and so on. The time of the whole step follows from the times of two smaller steps, on a line in FLOPs,
    because a part of a step does not grow with the grid.
    """

    def __init__(self, workload: Workload, processes: int, token_bytes: Mapping[str, float], memory: float) -> None:
        """`token_bytes` are the bytes of activations per token, by dataset; `memory` are the bytes of this machine."""
        self._recipe, self._datasets = workload.recipe, workload.datasets
        self._accelerator = make_accelerator(self._recipe.train.clip)
        self._state = TrainingState(self._recipe, workload.model(), self._accelerator, None)
        self._token_bytes, self._memory = token_bytes, memory
        self._windows = max(1, self._recipe.train.batch // processes)  # of a draw

    def measure(self, seconds: float) -> dict[str, StepTime]:
        """Return the time of each dataset's step. This takes about `seconds`, and longer on a slow machine."""
        started = time.perf_counter()
        most_work = self._affordable_work(seconds / len(self._datasets) / (1 + ROUNDS))
        sizes = {name: self._sizes(dataset) for name, dataset in self._datasets.items()}
        # The smallest size is the other end of the line, so it is not chosen.
        steps = {
            name: next((step for step in some[:-1] if step.work <= most_work and self._fits(step)), some[-2])
            for name, some in sizes.items()
        }
        smaller = [name for name, step in steps.items() if step.work < sizes[name][0].work]
        smallest = {name: median(self._take(sizes[name][-1]) for _ in range(ROUNDS)) for name in smaller}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in progress_bar(range(1 + MOST_ROUNDS), desc="dry run", unit="round", leave=False):
            left = started + seconds - time.perf_counter()
            if number > ROUNDS and left < sum(taken[-1] for taken in times.values()):
                break
            for name, step in steps.items():
                times[name].append(self._take(step))
        found = {name: StepTime(median(taken[1:])) for name, taken in times.items()}  # the first round is slow
        for name in smaller:
            whole, step, least = sizes[name][0], steps[name], sizes[name][-1]
            slope = max(found[name].seconds - smallest[name], 0.0) / (step.work - least.work)
            found[name] = StepTime(found[name].seconds + slope * (whole.work - step.work), extrapolated=True)
        return found

    def _affordable_work(self, limit: float) -> float:
        """Return the work of a step that takes about `limit` seconds, by steps of the dataset with the fewest tokens.

        Steps grow until one takes half the limit.
        """
        dataset = min(self._datasets.values(), key=lambda dataset: dataset.source.tokens)
        rate = 0.0
        for step in reversed(self._sizes(dataset)):
            if rate and not self._fits(step):
                break
            seconds = min(self._take(step), self._take(step))  # the first of its kind is slow
            rate = step.work / seconds
            if seconds > limit / 2:
                break
        return limit * rate

    def _sizes(self, dataset: WorkloadDataset) -> list[_SizedStep]:
        """Return the step itself, the step of one window, then steps on smaller and smaller grids."""
        one_window, grid = resized(self._recipe, windows=1), dataset.grid
        whole = resized(self._recipe, self._windows, self._recipe.train.draws)
        steps = [_SizedStep(dataset, whole, grid), _SizedStep(dataset, one_window, grid)]
        while max(grid) > SMALLEST:
            grid = max(MIN_GRID, grid[0] // 4 * 2), max(MIN_GRID, grid[1] // 4 * 2)
            steps.append(_SizedStep(dataset, one_window, grid))
        return steps

    def _fits(self, step: _SizedStep) -> bool:
        """Return whether the step's activations fit in this machine's memory."""
        train = step.recipe.train
        tokens = min(train.batch, train.micro_batch or train.batch) * step.grid[0] * step.grid[1] / PATCH
        return tokens * self._token_bytes[step.dataset.name] < MEMORY_SHARE * self._memory

    def _take(self, step: _SizedStep) -> float:
        """Take a step, which moves the weights at random, and return its seconds."""
        dry_run = DryRun(step.recipe, step.dataset.spec, step.grid, self._accelerator)
        return dry_run.step(self._state).read().whole


@dataclass
class Measurement:
    """The counted dry runs of one dataset under one variant."""

    times: list[StepSeconds] = field(default_factory=list)
    memory: float | None = None  # peak bytes of the GPU
    reason: str | None = None  # why nothing was measured


def measure_variants(
    recipes: Mapping[str, Recipe], workload: Workload, accelerator: Accelerator, seconds: float, every: bool = False
) -> dict[str, dict[str, Measurement]]:
    """Measure variants, each a recipe, for about `seconds` in all; return the measurements of their datasets.

    On a CPU variants take turns too, so that other load on the machine affects all of them: the first one is measured,
    and the others while there is time, or all with `every`. On a GPU they come one after another, because each would
    take memory from the others.
    """
    found = {name: {dataset: Measurement() for dataset in workload.datasets} for name in recipes}
    on_gpu = accelerator.device.type == "cuda"
    groups = [{name: recipe} for name, recipe in recipes.items()] if on_gpu else [recipes]
    share = seconds / max(1, len(groups))
    with progress_bar(desc="benchmark", unit="round", leave=False) as bar:
        for group in groups:
            _take_turns(_warm_up(group, found, workload, accelerator, share, every, bar), share, bar)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    return found


@dataclass
class _VariantStep:
    """A dry run of one dataset under one variant. The steps of a variant share its model, optimizer and averages."""

    measurement: Measurement
    dry_run: DryRun
    state: TrainingState
    device: torch.device

    def warm_up(self) -> None:
        """Take a step that does not count. If it fails, the reason is kept and no other step is taken."""
        if self.measurement.reason is not None:
            return
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self.dry_run.step(self.state).read()
        except RuntimeError as error:  # out of memory, or no compiler
            first_line = str(error).strip().partition("\n")[0][:100]
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            self.measurement.reason = "out of memory" if out_of_memory else f"{type(error).__name__}: {first_line}"
            self.state.parallel.zero_grad()
            return
        if on_gpu:
            self.measurement.memory = float(torch.cuda.max_memory_allocated(self.device))

    def take_turn(self) -> None:
        """Take the steps of one round."""
        timers = [self.dry_run.step(self.state) for _ in range(TURN[self.device.type])]
        self.measurement.times.extend(timer.read() for timer in timers)


def _warm_up(
    recipes: Mapping[str, Recipe],
    found: Mapping[str, Mapping[str, Measurement]],
    workload: Workload,
    accelerator: Accelerator,
    seconds: float,
    every: bool,
    bar: Any,
) -> list[_VariantStep]:
    """Return the steps of variants that work here and for which there is time. The other variants get a reason."""
    ready: list[_VariantStep] = []
    end, round_seconds, device = time.perf_counter() + seconds, 0.0, accelerator.device
    for name, recipe in recipes.items():
        bar.set_postfix_str(name)
        wanted, reason = every or not ready, "no time for it within the seconds given"
        try:
            state = TrainingState(recipe, workload.model(), accelerator, None)
            steps = [
                _VariantStep(found[name][one.name], DryRun(recipe, one.spec, one.grid, accelerator), state, device)
                for one in workload.datasets.values()
            ]
            if wanted or end - time.perf_counter() > ROUNDS * round_seconds:
                for _ in range(WARM_UP[device.type]):
                    started = time.perf_counter()
                    for step in steps:
                        step.warm_up()
                own = time.perf_counter() - started  # of the last round
                if wanted or end - time.perf_counter() >= ROUNDS * (round_seconds + own):
                    ready += [step for step in steps if step.measurement.reason is None]
                    round_seconds += own
                    continue
        except UserError as error:  # this device, model or recipe does not allow it
            reason = str(error).partition("\n")[0]
        for measurement in found[name].values():
            measurement.reason = reason
    return ready


def _take_turns(steps: Sequence[_VariantStep], seconds: float, bar: Any) -> None:
    """Take rounds of all steps for `seconds`: at least ROUNDS, but fewer if ROUNDS take twice as long."""
    begin = ended = time.perf_counter()
    number, last = 0, 0.0  # last: seconds of the last round
    while steps and ended - begin < (seconds - last if number >= ROUNDS else 2 * seconds):
        for step in steps:
            step.take_turn()
        before, ended = ended, time.perf_counter()
        number, last = number + 1, ended - before
        bar.update()


def profile_step(
    name: str, recipe: Recipe, workload: Workload, dataset: str, accelerator: Accelerator, folder: Path
) -> Path:
    """Profile a dataset's step with torch's profiler, and return the file of the table.

    Writes <name>-<dataset>.json, for chrome://tracing or Perfetto, and a table of kernels, or on a CPU of operators, in
    <name>-<dataset>.md. Raises UserError if the folder cannot be written.
    """
    on_gpu = accelerator.device.type == "cuda"
    state, sizes = TrainingState(recipe, workload.model(), accelerator, None), workload.datasets[dataset]
    dry_run = DryRun(recipe, sizes.spec, sizes.grid, accelerator)
    for _ in range(WARM_UP[accelerator.device.type]):
        dry_run.step(state).read()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(PROFILED_STEPS):
            dry_run.step(state)
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in found.key_averages()
        if event.device_type == kind
    ]
    total = sum(spent for spent, *_ in times)  # microseconds
    body = []
    for spent, calls, key in sorted(times, key=lambda row: -row[0])[:PROFILED_ROWS]:
        if spent > 0:
            numbers = f"{calls / PROFILED_STEPS:g}", digits(spent / PROFILED_STEPS / 1e3), f"{100 * spent / total:.1f}"
            body.append([key[:NAME_WIDTH], *numbers])
    title = f"{name}, {dataset}, {sizes.grid[0]} x {sizes.grid[1]}, {recipe.train.global_batch} windows a step"
    head = ["kernel" if on_gpu else "operator", "calls", "ms a step", "share %"]
    table = folder / f"{name}-{dataset}.md"
    try:
        found.export_chrome_trace(str(table.with_suffix(".json")))
        table.write_text(f"{title}\n\n{markdown(head, body)}\n")
    except (OSError, RuntimeError) as error:
        raise UserError(f"--profile: cannot write into {folder}: {error}") from error
    return table

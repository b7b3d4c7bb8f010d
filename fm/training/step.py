"""One optimizer step: fetch, forward, backward, reduce the metrics, clip, update, average.

`train_step` is the only function that takes an optimizer step. Training and `fm replay` give it the windows of the
schedule, dry runs (fm/training/dry_run.py) random data. Windows, their transformations, teacher-forcing coins, noise
and learning rate of a step are functions of (recipe, step), so a run that is continued needs the step number and
nothing else. With adaptive sampling the windows also depend on the history of sampling shares, which the checkpoints
hold.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data_pipeline.windows.division import Division, MicroBatch
from data_pipeline.windows.reader import Batch
from data_pipeline.windows.schedule import Draw
from fm.config import Recipe
from fm.distributed import autocast_dtype, precision
from fm.model.surrogate import Surrogate
from fm.training.objective import forcing_coins, forcing_prob, input_noise, unroll_length
from fm.training.optim import learning_rate, learns_alone
from fm.training.state import TrainingState

PHASES = ("data", "forward", "backward", "optimizer")  # of a step, in this order for each of its micro-batches


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step over all processes, in one tensor on the device (3 * draws + 2,).

    For each draw: loss, mse and wavelet_l1. Then the gradient norm, and 1 if a process was asked to stop, else 0.
    """

    values: Tensor

    @classmethod
    def reduce(cls, gathered: Tensor) -> "StepMetrics":
        """Return the metrics of all processes from a row of each, (processes, 3 * draws + 2).

        Losses are parts that add up. Every process has the same norm. One process that was asked to stop is enough.
        """
        return cls(torch.cat([gathered[:, :-2].sum(dim=0), gathered[:, -2:].amax(dim=0)]))

    @property
    def losses(self) -> list[float]:
        """Return the loss of each draw."""
        return self.values[:-2:3].tolist()

    @property
    def mse(self) -> float:
        """Return the mean squared error, averaged over the draws."""
        return float(self.values[1:-2:3].mean())

    @property
    def wavelet_l1(self) -> float:
        """Return the wavelet L1 loss, averaged over the draws."""
        return float(self.values[2:-2:3].mean())

    @property
    def grad_norm(self) -> float:
        """Return the norm of the gradient before clipping."""
        return float(self.values[-2])

    @property
    def stop_requested(self) -> bool:
        """Return whether a process was asked to stop."""
        return bool(self.values[-1])

    def found_inf(self) -> Tensor:
        """Return 1.0 if a loss or the gradient norm is not finite, else 0.0. The scalar stays on the device."""
        return 1 - torch.isfinite(torch.cat([self.values[:-2:3], self.values[-2:-1]])).all().float()


@dataclass(frozen=True)
class PendingStep:
    """A step that was taken; its metrics may still be on the device."""

    step: int  # optimizer steps before it
    draws: Sequence[Draw]
    learning_rate: float
    started: float  # time.perf_counter()
    cpu_started: float  # time.process_time()
    data_seconds: float  # that this process waited for data
    metrics: StepMetrics

    def elapsed(self) -> tuple[float, float]:
        """Return the seconds, and this process's CPU seconds, since the step began."""
        return time.perf_counter() - self.started, time.process_time() - self.cpu_started


class PendingSteps:
    """The steps since the last synchronization of host and device.

    To read a number from a GPU, the host must wait until the GPU has computed it, and the GPU gets no work meanwhile.
    So the metrics of several steps stay on the device and are read together. Until then, a flag on the device
    (`found_inf`) stops the optimizer and the averages from the first step on whose loss or gradient is not finite.
    """

    def __init__(self) -> None:
        self._steps: list[PendingStep] = []
        self._found_inf: Tensor | None = None

    def append(self, step: PendingStep) -> None:
        """Add a step that was just taken."""
        self._steps.append(step)

    def found_inf(self, metrics: StepMetrics) -> Tensor:
        """Return 1.0 if any step since the last synchronization had a non-finite loss or gradient norm, else 0.0.

        `metrics` are those of the step in progress. The scalar stays on the device.
        """
        found = metrics.found_inf()
        self._found_inf = found if self._found_inf is None else torch.maximum(self._found_inf, found)
        return self._found_inf

    def read(self) -> list[PendingStep]:
        """Wait for the device and return the steps since the last synchronization, their metrics on the host."""
        steps, self._steps, self._found_inf = self._steps, [], None
        rows = torch.stack([step.metrics.values for step in steps]).cpu()
        return [replace(step, metrics=StepMetrics(row)) for step, row in zip(steps, rows, strict=True)]


def train_step(
    recipe: Recipe,
    state: TrainingState,
    division: Division,
    batches: Iterator[Batch],
    accelerator: Accelerator,
    step: int,
    skip_update: Callable[[StepMetrics], bool | Tensor] = lambda metrics: False,
    stop_requested: bool = False,
    end_phase: Callable[[str], None] = lambda phase: None,
) -> PendingStep:
    """Take the step after `step` optimizer steps. Collective.

    `batches` yields this process's batches of the step, in the order of `division.micro_batches(step)`.

    `skip_update` is called with the metrics while the parameters have their gradients, not clipped yet. It returns True
    to leave weights and averages as they are, False to update them, or a scalar on the device that is 1 to leave them
    (`PendingSteps.found_inf`). `stop_requested` says whether this process was asked to stop. `end_phase` is called with
    the name of a phase, one of PHASES, when the host has queued all of its work.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    torch.manual_seed(recipe.run.seed * 1_000_003 + step)  # a random layer draws the same numbers in a continued run
    parallel, draws = state.parallel, division.draws_of(step)
    rate = learning_rate(step, recipe.train)
    parallel.optimizer.set_learning_rate(rate)
    parallel.optimizer.skip_unused([draw.dataset for draw in draws], alone=learns_alone(recipe.adapt, step))

    losses, data_seconds = torch.zeros(division.draws, 3, device=accelerator.device), 0.0
    micro_batches = division.micro_batches(step)
    autocast = autocast_dtype(recipe.train.precision, accelerator.device)
    for number, micro_batch in enumerate(micro_batches):
        fetch_started = time.perf_counter()
        batch = next(batches).to(accelerator.device, non_blocking=True)
        data_seconds += time.perf_counter() - fetch_started
        batch = state.augmented(batch, micro_batch.places)
        end_phase("data")
        assert batch.draw == micro_batch.draw
        assert batch.dataset == division.schedule.source(batch.draw).name  # the shares are those the reader had
        inputs = _objective_inputs(recipe, step, micro_batch, batch, parallel.model)
        # A window counts 1 / global_batch. Processes average their gradients, which divides by their number.
        weight = len(micro_batch.places) * accelerator.num_processes / recipe.train.global_batch
        with parallel.accumulate(last=number == len(micro_batches) - 1), precision(autocast):
            terms = parallel.objective(**inputs)
            end_phase("forward")
            parallel.backward(terms["loss"] * weight)
            end_phase("backward")
        part = torch.stack([terms["loss"].detach(), terms["mse"], terms["wavelet_l1"]])
        losses[batch.draw - step * division.draws] += len(micro_batch.places) / recipe.train.batch * part

    norm = parallel.grad_norm()
    own = torch.cat([losses.flatten(), norm.to(losses).reshape(1), losses.new_full((1,), float(stop_requested))])
    metrics = StepMetrics.reduce(accelerator.gather(own[None]))
    skip = skip_update(metrics)
    if skip is not True:
        found_inf = skip if isinstance(skip, Tensor) else None
        parallel.clip(norm, recipe.train.clip)
        parallel.step(found_inf)
        state.ema.update(parallel.shards(), step, found_inf)
    parallel.zero_grad()
    end_phase("optimizer")
    return PendingStep(step, draws, rate, started, cpu_started, data_seconds, metrics)


def _objective_inputs(
    recipe: Recipe, step: int, micro_batch: MicroBatch, batch: Batch, model: Surrogate
) -> dict[str, Any]:
    """Return the objective's arguments: windows as long as the step's unroll, their coins, noise and scalars."""
    seed, train, device = recipe.run.seed, recipe.train, batch.fields.device
    length = unroll_length(step, train.steps, recipe.finetune, batch.dataset)
    prob = forcing_prob(step, train.steps, recipe.finetune)
    coins = torch.from_numpy(forcing_coins(seed, batch.draw, train.batch, length, prob)[micro_batch.places])
    if device.type == "cuda":  # a GPU copies without making the host wait only from page-locked memory
        coins = coins.pin_memory()
    noise = None
    if train.jitter:
        shape = (recipe.data.context + length - 1, *batch.fields.shape[2:])
        noise = input_noise(seed, batch.draw, micro_batch.places, shape, train.jitter, device)
    return {
        "fields": batch.fields[:, : recipe.data.context + length],
        "constants": batch.constants,
        "forced": coins.to(device, non_blocking=True),
        "dataset": batch.dataset,
        "noise": noise,
        "scalars": model.normalize_scalars(batch.scalars, batch.dataset, len(batch.fields), device),
    }

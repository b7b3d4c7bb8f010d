"""`fm plan`: what a run will cost before it is launched: work, time and memory, by dataset and for the mixture.

Work and memory are counted (fm/lab/workload.py). The seconds of a step are estimated from a GPU's data sheet
(fm/lab/hardware.py), or measured on this machine by dry runs (fm/lab/dry_runs.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from pydantic_core import to_jsonable_python

from data_pipeline.progress import progress_bar
from data_pipeline.registry import PATCH
from data_pipeline.windows.division import Division
from fm.config import Recipe
from fm.distributed import autocast_dtype
from fm.lab.dry_runs import SizedDryRuns, StepTime
from fm.lab.hardware import INFINIBAND, STATE_TOUCHES, AssumedSpeed, Interconnect, buckets, device_name
from fm.lab.workload import FLOAT_BYTES, Footprint, Workload, WorkloadDataset, footprint, read_workload
from fm.training.flops import BACKWARD, forward_flops, forward_passes, held_calls
from fm.training.objective import Unroll, unroll_length
from fm.training.optim import newton_schulz_flops, trunk_matrices

USABLE = 0.9  # of the memory: contexts, workspaces and fragments take the rest
# Copies of the parameters on the main process beside the moments: weights, gradients, average, and the model with
# averaged weights that validates. DDP exchanges gradients through one more.
COPIES = 4


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset, and a step that draws only this dataset. If unrolls grow, figures are means over the run."""

    grid: tuple[int, int]
    windows: int  # training examples
    share: float  # of the draws
    draws: int  # in the whole run
    passes: float  # over its windows, in the whole run
    own_parameters: int  # that no other dataset uses
    tokens: float  # token updates: windows x model calls x tokens of a frame
    flops: float
    read_bytes: float
    activation_bytes: float  # of the most windows and model calls that one process holds at once
    seconds: float  # with the exchange of gradients, if it is estimated
    extrapolated: bool  # measured on fewer windows or a smaller grid
    validation_calls: int  # model calls of a validation, on average
    forward_flops: float  # of one model call
    exchange_seconds: float  # of `seconds`: what the exchange of gradients adds to the backward pass

    @property
    def computing_seconds(self) -> float:
        """Return the seconds of a step without the exchange of gradients."""
        return self.seconds - self.exchange_seconds


@dataclass(frozen=True)
class Exchange:
    """The exchange of gradients between all processes in one step."""

    bytes: float
    seconds: float  # the backward pass hides a part of them
    link: float  # GB/s assumed within a node
    network: float  # GB/s assumed between nodes


@dataclass(frozen=True)
class Plan:
    """The cost of a run. FLOPs, tokens and bytes read count all processes, memory and seconds one process."""

    run: str
    published: bool  # every dataset has its published size
    machine: str  # and how its times were found
    steps: int
    global_batch: int
    processes: int
    parameters: int
    state_bytes: float  # weights, gradients, moments, averages
    input_bytes: float  # windows of the largest micro-batch
    memory_bytes: float  # of the machine
    utilisation: float | None  # assumed; None if times were measured
    exchange: Exchange | None  # None for one process, or if times were measured
    validations: int
    checkpoint_bytes: float  # of one checkpoint
    micro_batch: int  # most windows at once on one process
    fitting_micro_batch: int  # most windows that would fit; 0 if one does not
    datasets: dict[str, DatasetPlan]
    notes: tuple[str, ...]

    def mean(self, quantity: str) -> float:
        """Return a quantity of a step, averaged over datasets at their shares."""
        return sum(dataset.share * getattr(dataset, quantity) for dataset in self.datasets.values())

    def with_mean(self, quantity: str) -> list[float]:
        """Return a quantity of a step for each dataset, then its mean."""
        return [*(getattr(dataset, quantity) for dataset in self.datasets.values()), self.mean(quantity)]

    @property
    def training_seconds(self) -> float:
        """Return the seconds of all steps, without validations."""
        return self.steps * self.mean("seconds")

    @property
    def validation_seconds(self) -> float:
        """Return the seconds of one validation, on one process, at the speed of training."""
        total = 0.0
        for dataset in self.datasets.values():
            seconds_per_flop = dataset.computing_seconds * self.processes / dataset.flops
            total += seconds_per_flop * (dataset.validation_calls * dataset.forward_flops)
        return total

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole run, with its validations."""
        return self.training_seconds + self.validations * self.validation_seconds

    @property
    def needed_bytes(self) -> float:
        """Return the memory of the main process: state, and windows and activations of the largest micro-batch."""
        activations = max(dataset.activation_bytes for dataset in self.datasets.values())
        return self.state_bytes + self.input_bytes + activations

    @property
    def fits(self) -> bool:
        """Return whether the needed memory is at most the USABLE share of what there is."""
        return self.needed_bytes <= USABLE * self.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Return all fields, and the sums that the tables show."""
        sums = ("training_seconds", "validation_seconds", "seconds", "needed_bytes", "fits")
        mixture = {name: self.mean(name) for name in ("tokens", "flops", "read_bytes", "seconds")}
        plain: dict[str, Any] = to_jsonable_python(self)
        return plain | {"mixture": mixture, **{name: getattr(self, name) for name in sums}}


def estimated_plan(
    recipe: Recipe,
    speed: AssumedSpeed,
    network: float = INFINIBAND,
    processes: int = 1,
    require_shards: bool = False,
) -> Plan:
    """Return the plan for GPUs of the table, in nodes of 8 with `network` GB/s each between them.

    Raises UserError if the processes cannot share the global batch, and for missing shards (`read_workload`).
    """
    planner = _Planner(read_workload(recipe, require_shards), processes, speed.bf16)
    gpu, train = speed.gpu, recipe.train
    links, sent = Interconnect(gpu.link, network), buckets(float(FLOAT_BYTES * planner.parameters))
    times = {}
    for name, window in planner.windows.items():
        calls = window.passes / forward_passes(1, None)  # model calls with as many forward and backward passes
        micro_batches = train.draws * -(-train.batch // processes // planner.micro_batch)
        windows = train.global_batch / processes
        seconds = speed.seconds(
            windows * window.passes * window.forward_flops + planner.optimizer_flops,
            windows / planner.counted_windows * calls * window.footprint.moved_bytes
            + STATE_TOUCHES * FLOAT_BYTES * planner.parameters,
            micro_batches * calls * window.footprint.operations,
        )
        # Gradients get their final value in the last backward pass.
        backward = BACKWARD / window.passes * seconds / micro_batches
        added = links.after_backward(sent, backward, processes)
        times[name] = StepTime(seconds + added, exchange=added)
    exchange = None
    if processes > 1:
        reduced = sum(links.all_reduce(size, processes) for size in sent)
        exchange = Exchange(sum(sent), reduced, links.link, links.network)
    kind = f"{gpu.bf16_tflops:g} TFLOP/s bf16" if speed.bf16 else f"{gpu.float32_tflops:g} TFLOP/s float32"
    machine = f"{gpu.name}: {kind}, {gpu.bandwidth:g} GB/s, {gpu.memory:g} GB"
    return planner.plan(machine, 1e9 * gpu.memory, times, speed.utilisation, exchange)


def measured_plan(recipe: Recipe, seconds: float, processes: int = 1, require_shards: bool = False) -> Plan:
    """Return the plan for this machine, by dry runs of about `seconds`. Raises UserError as `estimated_plan`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = autocast_dtype(recipe.train.precision, torch.device(device)) is not None
    workload = read_workload(recipe, require_shards)
    planner = _Planner(workload, processes, bf16)
    if device == "cuda":
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = float(psutil.virtual_memory().available)
    token_bytes = {
        name: window.held_bytes / workload.datasets[name].source.tokens for name, window in planner.windows.items()
    }
    times = {}
    for name, measured in SizedDryRuns(workload, processes, token_bytes, memory).measure(seconds).items():
        # A dry run takes the last step of the run, whose unroll has its full length.
        mean_over_last = planner.windows[name].passes / forward_passes(recipe.unroll_steps(name), recipe.finetune)
        times[name] = replace(measured, seconds=measured.seconds * mean_over_last)
    return planner.plan(f"this machine, measured: {device_name(device)}", memory, times)


@dataclass(frozen=True)
class _WindowCount:
    """What one window of a dataset takes through a training step. Means over the run, if unrolls grow."""

    forward_flops: int  # of one model call
    calls: float  # model calls
    passes: float  # forward passes, where a backward pass counts two
    held_bytes: float  # activations held at once, at the full length of the unroll
    footprint: Footprint  # of one model call with `counted_windows` windows


class _Planner:
    """Makes the plan of a workload whose steps are shared by `processes` processes."""

    def __init__(self, workload: Workload, processes: int, bf16: bool) -> None:
        """Count the step of every dataset, with a progress bar."""
        self.workload, self.processes, recipe = workload, processes, workload.recipe
        self.schedule, train = workload.schedule(), workload.recipe.train
        division = Division(self.schedule, 0, processes, train.draws, recipe.sampling.draw, train.micro_batch)
        self.micro_batch = division.largest_micro_batch
        self.counted_windows = min(2, self.micro_batch)  # one of several windows keeps a little more than one alone
        self.model = workload.fake_model()
        self.parameters = self.model.num_parameters()
        matrices = trunk_matrices(self.model) if train.optimizer == "muon" else []
        self.moments = 2 * self.parameters - sum(matrix.numel() for matrix in matrices)  # Muon has one, AdamW two
        self.optimizer_flops = sum(newton_schulz_flops(*matrix.shape) for matrix in matrices)  # of a step
        one_call = Unroll(self.model, recipe.loss, None, torch.bfloat16 if bf16 else None)
        self.windows = {
            name: self._count(one_call, dataset)
            for name, dataset in progress_bar(workload.datasets.items(), desc="count", unit="dataset", leave=False)
        }

    def _count(self, one_call: Unroll, dataset: WorkloadDataset) -> _WindowCount:
        recipe, name = self.workload.recipe, dataset.name
        found = footprint(one_call, name, dataset.grid, self.counted_windows)
        kept = found.kept_bytes / self.counted_windows
        return _WindowCount(
            forward_flops=forward_flops(self.model, name, dataset.grid),
            calls=_mean_over_run(recipe, name, float),
            passes=_mean_over_run(recipe, name, lambda calls: forward_passes(calls, recipe.finetune)),
            held_bytes=kept * held_calls(recipe.unroll_steps(name), recipe.finetune),
            footprint=found,
        )

    def plan(
        self,
        machine: str,
        memory: float,
        times: Mapping[str, StepTime],
        utilisation: float | None = None,
        exchange: Exchange | None = None,
    ) -> Plan:
        """Return the plan for a machine on which the datasets' steps take `times`."""
        recipe, train, datasets = self.workload.recipe, self.workload.recipe.train, self.workload.datasets
        state = FLOAT_BYTES * (self.parameters * (COPIES + (self.processes > 1)) + self.moments)
        held = max(self.windows[name].held_bytes + dataset.window_bytes for name, dataset in datasets.items())
        draws = self.schedule.counts(train.steps * train.draws)
        return Plan(
            run=recipe.run.name,
            published=all(dataset.published for dataset in datasets.values()),
            machine=machine,
            steps=train.steps,
            global_batch=train.global_batch,
            processes=self.processes,
            parameters=self.parameters,
            state_bytes=state,
            input_bytes=self.micro_batch * max(dataset.window_bytes for dataset in datasets.values()),
            memory_bytes=memory,
            utilisation=utilisation,
            exchange=exchange,
            validations=_num_validations(recipe),
            checkpoint_bytes=FLOAT_BYTES * (2 * self.parameters + self.moments),  # weights, average, moments
            micro_batch=self.micro_batch,
            fitting_micro_batch=int(max(0.0, USABLE * memory - state) // held),
            datasets={name: self._dataset(dataset, draws[name], times[name]) for name, dataset in datasets.items()},
            notes=self.workload.notes,
        )

    def _dataset(self, dataset: WorkloadDataset, draws: int, step: StepTime) -> DatasetPlan:
        name, window, batch = dataset.name, self.windows[dataset.name], self.workload.recipe.train.global_batch
        validation = self.workload.recipe.validation
        rollout = dataset.frames - self.model.context  # steps of one, from the first frames
        rollouts = math.ceil(validation.rollouts * rollout / validation.rollout_every)
        calls = validation.windows + rollouts if validation.every else 0
        own = self.model.parameters_by_datasets().get(frozenset({name}), []) if len(self.model.specs) > 1 else []
        return DatasetPlan(
            grid=dataset.grid,
            windows=dataset.source.windows,
            share=self.schedule.shares[name],
            draws=draws,
            passes=draws * self.schedule.batch / dataset.source.windows,
            own_parameters=sum(parameter.numel() for parameter in own),
            tokens=batch * window.calls * dataset.grid[0] * dataset.grid[1] / PATCH,
            flops=batch * window.forward_flops * window.passes,
            read_bytes=batch * dataset.window_bytes,
            activation_bytes=self.micro_batch * window.held_bytes,
            seconds=step.seconds,
            extrapolated=step.extrapolated,
            validation_calls=calls,
            forward_flops=window.forward_flops,
            exchange_seconds=step.exchange,
        )


def _mean_over_run(recipe: Recipe, dataset: str, of_calls: Callable[[int], float]) -> float:
    """Return the mean over the run of a function of the model calls that a window takes."""
    if recipe.finetune is None:
        return of_calls(1)
    steps = recipe.train.steps
    some = np.linspace(0, steps - 1, min(steps, 1000)).astype(int).tolist()
    return float(np.mean([of_calls(unroll_length(step, steps, recipe.finetune, dataset)) for step in some]))


def _num_validations(recipe: Recipe) -> int:
    """Return the number of validations: every `validation.every` steps, and at the end of a longer run."""
    every, steps = recipe.validation.every, recipe.train.steps
    return steps // every + (steps > every and steps % every > 0) if every else 0

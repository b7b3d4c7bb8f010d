"""What a recipe trains and on what: from the manifests of its shards, or where there are none from the cards.

A card states the published grid and the published trajectories, so a run on The Well can be planned without The Well.

A run's cost before it is launched: work, time and memory, by dataset and for the mixture that the run draws.

Seconds of a training step on this machine, measured: a few steps per dataset, on random data of its grid.

A step is the trainer's own (fm/training/step.py). Datasets take turns, as they do in training, and the first round,
which is slow, does not count. What would take too long is made smaller, first to one window, then to a grid of half the
sides and so on; its time follows from that of two sizes, on a line in FLOPs, since a part of a step does not grow with
the grid.

Makes the plan of a workload: counts what its steps do and hold, and takes their times from a probe or a ceiling.

The footprint of a step: its products, the bytes it moves and the bytes it keeps, counted on fake tensors as FLOPs are
(fm/training/flops.py).
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from data_pipeline.files import UserError
from data_pipeline.registry import PATCH, Card, Registry, load_registry
from data_pipeline.remote import is_url
from data_pipeline.shards.format import MANIFEST_NAME
from data_pipeline.windows.loader import open_readers, sources
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Division, Source
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.config import Recipe
from fm.datasets import check_names, check_unrolls, dataset_specs, new_model, open_split
from fm.distributed import autocast_dtype, make_accelerator
from fm.lab.hardware import INFINIBAND, STATE_TOUCHES, Ceiling, Interconnect, buckets
from fm.model.baselines import BaselineConfig
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.surrogate import MIN_GRID, Surrogate
from fm.training.flops import BACKWARD, fake_mode, forward_flops, forward_passes, held_calls, zero_fields
from fm.training.mixing import Mixing
from fm.training.objective import Unroll, unroll_length
from fm.training.state import TrainingState
from fm.training.step import DryRun, resized

FLOAT_BYTES = 4
STATISTICS = ("mean", "std", "mean_delta", "std_delta")


@dataclass(frozen=True)
class DatasetWork:
    """One dataset as training meets it."""

    spec: DatasetSpec
    source: Source
    grid: tuple[int, int]  # (H, W)
    window_bytes: int  # read for a window, its constant fields among them
    frames: int  # of the longest trajectory
    measured_shards: bool  # False where the numbers are the card's

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Workload:
    """A recipe with its datasets by name, sorted, and the configuration of its model; `notes` say what was assumed."""

    recipe: Recipe
    datasets: dict[str, DatasetWork]
    config: ModelConfig | BaselineConfig
    notes: tuple[str, ...]

    def mixing(self) -> Mixing:
        """The schedule that the run would follow."""
        return Mixing(self.recipe, [work.source for work in self.datasets.values()])

    def model(self) -> Surrogate:
        """A new model of these sizes."""
        return new_model(self.config, [work.spec for work in self.datasets.values()], self.recipe.run.seed)

    def fake_model(self) -> Surrogate:
        """The same of fake tensors: shapes without memory."""
        with FakeTensorMode():
            return self.model()


def read_workload(recipe: Recipe, require_shards: bool = False) -> Workload:
    """The workload of a recipe.

    UserError where there are neither shards nor a card with published sizes, or no shards where they are required.
    """
    registry = load_registry(recipe.data.registry)
    check_names(recipe.data.datasets, registry)
    readers = _readers(recipe, registry, require_shards)
    check_unrolls(recipe, readers)
    datasets = _from_shards(recipe, readers, registry)
    unread = [name for name in recipe.data.datasets or () if name not in datasets]
    datasets |= {name: published_work(recipe, registry.card(name)) for name in unread}
    config, notes = planned_config(recipe)
    if unread:
        which = "no shards" if len(unread) == len(datasets) else f"no shards of {', '.join(unread)}"
        notes = [f"{which} in {recipe.data.shards}: grids and windows as published, from the cards", *notes]
    return Workload(recipe, dict(sorted(datasets.items())), config, tuple(notes))


def _readers(recipe: Recipe, registry: Registry, required: bool) -> dict[str, ShardReader]:
    """Readers of the training shards that are there."""
    data = recipe.data
    if required or data.datasets is None or is_url(data.shards):
        return open_split(recipe, registry, "train")
    shards = Path(data.shards)
    found = [name for name in data.datasets if (shards / name / "train" / MANIFEST_NAME).exists()]
    return open_readers(shards, found, "train") if found else {}


def _from_shards(recipe: Recipe, readers: dict[str, ShardReader], registry: Registry) -> dict[str, DatasetWork]:
    found = {}
    lengths = {name: recipe.window_length(name) for name in readers}
    listed = sources(readers, lengths)
    for spec, source in zip(dataset_specs(readers, registry), listed, strict=True):
        manifest = readers[spec.name].manifest
        size = lengths[spec.name] * manifest.frame_bytes + manifest.constants_bytes
        frames = max(trajectory.frames for trajectory in manifest.trajectories)
        found[spec.name] = DatasetWork(spec, source, manifest.grid, size, frames, True)
    return found


def published_work(recipe: Recipe, card: Card) -> DatasetWork:
    """A dataset at its published size. UserError where the card does not state it."""
    length, (height, width) = recipe.window_length(card.name), card.grid
    windows = sum(trajectories * max(0, frames - length + 1) for trajectories, frames in card.train)
    if not windows:
        raise UserError(
            f"{card.name}: no shards in {recipe.data.shards}, and its card states no published training split with "
            f"windows of {length} frames; make shards with `data-pipeline shard`, or write `train` into the card"
        )
    names = card.state_channels + card.constant_channels
    stats = {key: dict.fromkeys(names, 1.0) for key in STATISTICS}  # sizes do not depend on them
    spec = DatasetSpec(card.name, card.state_channels, card.constant_channels, card.boundary, stats)
    size = FLOAT_BYTES * height * width * (length * len(card.state_channels) + len(card.constant_channels))
    source = Source(card.name, windows, card.tokens, (windows,))
    return DatasetWork(spec, source, card.grid, size, card.num_frames[-1], False)


def planned_config(recipe: Recipe) -> tuple[ModelConfig | BaselineConfig, list[str]]:
    """The model's configuration and what was assumed of it; a pretrained model may not be there yet."""
    config = recipe.baseline or recipe.model
    if recipe.finetune is None:
        return config or ModelConfig(), []
    try:
        find_checkpoint(recipe.finetune.pretrained)
    except UserError:
        taken = "the recipe's" if config else "the defaults; model.KEY=value gives others"
        return config or ModelConfig(), [f"no model in {recipe.finetune.pretrained} yet: sizes are {taken}"]
    return load_pretrained(recipe.finetune.pretrained).config, []


USABLE = 0.9  # of the memory: contexts, workspaces and fragments take the rest


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution, or both products that its backward pass computes.

    `kind` is linear (all channels with all), attention (batches of products) or depthwise (each channel with itself).
    """

    kind: str
    dtype: torch.dtype  # in which it is computed
    flops: int  # two per multiply-add
    bytes: int  # of operands and results, each counted once


@dataclass(frozen=True)
class Footprint:
    """What a forward and backward pass of some windows computes, moves and keeps, without the weights themselves."""

    kept_bytes: int  # held for the backward pass
    moved_bytes: int  # read and written by operations that are no matrix products, none of them fused
    operations: int  # number of kernels, about
    products: tuple[Product, ...]  # includes depthwise convolutions, which count among the moved bytes too


def footprint(objective: Unroll, dataset: str, grid: tuple[int, int], windows: int = 1, calls: int = 1) -> Footprint:
    """Return the footprint of `calls` model calls; the objective holds a model of fake tensors.

    The gradients of the parameters stay unset.
    """
    parameters = list(objective.model.parameters())
    kept = _KeptStorages(objective.model)
    with fake_mode(objective.model), kept.hooks, _OperationCounter() as counter:
        loss = _fake_loss(objective, dataset, grid, windows, calls)
        torch.autograd.grad(loss, parameters, allow_unused=True)
    return Footprint(kept.bytes, counter.bytes, counter.operations, tuple(counter.products))


def kept_bytes(objective: Unroll, dataset: str, grid: tuple[int, int], windows: int = 1, calls: int = 1) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, without the parameters.

    The objective may hold a model of fake or of real tensors; nothing is computed.
    """
    kept = _KeptStorages(objective.model)
    with fake_mode(objective.model), kept.hooks:
        _fake_loss(objective, dataset, grid, windows, calls)
    return kept.bytes


def _fake_loss(objective: Unroll, dataset: str, grid: tuple[int, int], windows: int, calls: int) -> torch.Tensor:
    fields, constants = zero_fields(objective.model, dataset, grid, windows, frames=calls + 1)
    forced = torch.ones(windows, calls, dtype=torch.bool)
    return objective(fields, constants, forced, dataset)["loss"]


class _KeptStorages:
    """Collects the storages that autograd keeps, each once, within the context `hooks`."""

    def __init__(self, model: Surrogate) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._storages[storage._cdata] = storage
        return tensor


class _OperationCounter(TorchDispatchMode):
    """Counts operations, lists matrix products and convolutions, and sums the bytes that the other operations move."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0
        self.products: list[Product] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view:
            self.operations += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            # an expanded tensor is read from its smaller storage
            moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
            product = _product(function._schema.name.removeprefix("aten::"), args, result, moved)
            if product is not None:
                self.products.append(product)
            if product is None or product.kind == "depthwise":  # limited by the memory's speed, not by arithmetic
                self.bytes += moved
        return result


def _product(name: str, args: Any, result: Any, moved: int) -> Product | None:
    """Return the operation as a Product, or None if it is no matrix product or convolution."""
    if name == "convolution":
        kind = "linear" if args[8] == 1 else "depthwise"
        return Product(kind, args[0].dtype, 2 * result.numel() * args[1][0].numel(), moved)
    if name == "convolution_backward":  # args: gradient of the result, input, weight, ..., groups, wanted gradients
        kind = "linear" if args[9] == 1 else "depthwise"
        once = 2 * args[0].numel() * args[2][0].numel()
        return Product(kind, args[1].dtype, once * sum(args[10][:2]), moved)
    if name in ("mm", "bmm"):
        left = args[0]
    elif name in ("addmm", "baddbmm"):
        left = args[1]
    else:
        return None
    return Product("attention" if left.dim() == 3 else "linear", left.dtype, 2 * result.numel() * left.shape[-1], moved)


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset, and what a step would cost that draws only it; means over a run whose unrolls grow."""

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
    seconds: float  # the exchange of gradients included, where it is reckoned
    extrapolated: bool  # measured on fewer windows or a smaller grid
    validation_calls: int  # model calls of a validation
    forward_flops: float  # of one of them
    exchange_seconds: float  # of `seconds`, what the exchange of gradients adds to the backward pass

    @property
    def computing_seconds(self) -> float:
        return self.seconds - self.exchange_seconds


@dataclass(frozen=True)
class Exchange:
    """The gradients' way through all processes in a step, by the model of fm/lab/hardware.py."""

    bytes: float
    seconds: float  # of which the backward pass hides a part
    link: float  # GB/s assumed within a node
    network: float  # GB/s assumed between nodes


@dataclass(frozen=True)
class Plan:
    """The run. FLOPs, tokens and bytes read are those of all processes together, memory and seconds of one."""

    run: str
    published: bool  # every dataset has its published size
    machine: str  # and how its times were found
    steps: int
    global_batch: int
    processes: int
    parameters: int
    state_bytes: float  # weights, gradients, moments, averages
    input_bytes: float  # windows of the largest piece
    memory_bytes: float  # that the machine has
    utilisation: float | None  # that was assumed; None where times were measured
    exchange: Exchange | None  # None where there is none, or where times were measured
    validations: int
    checkpoint_bytes: float  # of one checkpoint
    checkpoints: int  # kept at the end
    micro_batch: int  # most windows at once on one process
    fitting_micro_batch: int  # most that would fit; 0 where even one does not
    checkpointing_helps: bool  # whether finetune.checkpoint_activations would make it less
    datasets: dict[str, DatasetPlan]
    notes: tuple[str, ...]

    def mean(self, what: str) -> float:
        """A quantity of a step, averaged over datasets at their shares."""
        return sum(one.share * getattr(one, what) for one in self.datasets.values())

    @property
    def training_seconds(self) -> float:
        return self.steps * self.mean("seconds")

    @property
    def validation_seconds(self) -> float:
        """Of one validation, on one process, at the speed of training."""
        parts = self.datasets.values()
        pace = [one.computing_seconds * self.processes / one.flops for one in parts]  # seconds a FLOP
        calls = [one.validation_calls * one.forward_flops for one in parts]
        return sum(seconds * flops for seconds, flops in zip(pace, calls, strict=True))

    @property
    def seconds(self) -> float:
        return self.training_seconds + self.validations * self.validation_seconds

    @property
    def needed_bytes(self) -> float:
        """Memory of the main process: state, windows and activations of the largest piece."""
        return self.state_bytes + self.input_bytes + max(one.activation_bytes for one in self.datasets.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= USABLE * self.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything, with the sums that the tables show."""
        names = ("tokens", "flops", "read_bytes", "seconds")
        derived = {
            "mixture": {name: self.mean(name) for name in names},
            "training_seconds": self.training_seconds,
            "validation_seconds": self.validation_seconds,
            "seconds": self.seconds,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
        }
        plain: dict[str, Any] = json.loads(json.dumps({**asdict(self), **derived}))
        return plain


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
        self.state = TrainingState(self.recipe, workload.model(), self.accelerator, None)
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
        return Trial(work, resized(self.recipe, windows, draws), grid)

    def _step(self, trial: Trial) -> float:
        """Take a step; returns its seconds. The weights move, by noise."""
        return DryRun(trial.recipe, trial.work.spec, trial.grid, self.accelerator).step(self.state).read().whole


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


# Copies of the parameters on the main process: weights, gradients, two moments, average, and the model with averaged
# weights that validates. DDP exchanges gradients through one more.
COPIES = 6


class Planner:
    """Counts what a workload's steps hold and do, for `processes` that share them; `bf16` is the precision of products.

    UserError where the global batch cannot be divided among the processes.
    """

    def __init__(self, workload: Workload, processes: int, bf16: bool) -> None:
        recipe = self.recipe = workload.recipe
        self.workload, self.processes, self.bf16 = workload, processes, bf16
        self.mixing = workload.mixing()
        train, way = recipe.train, recipe.sampling.draw
        self.micro_batch = Division(
            self.mixing.schedule, 0, processes, train.draws, way, train.micro_batch
        ).largest_micro_batch
        self.model = workload.fake_model()
        self.parameters = self.model.num_parameters()
        self._one_call = Unroll(self.model, recipe.loss, None, torch.bfloat16 if bf16 else None)
        self.forward: dict[str, int] = {}
        self.kept: dict[str, float] = {}  # bytes, of one window and model call

    def count(self, traffic: bool) -> dict[str, Footprint]:
        """Count every dataset, with a progress bar; also what is moved, by dataset, where `traffic` is asked for."""
        moved = {}
        some = min(2, self.micro_batch)  # of several windows each keeps a little more than one alone
        for name, work in tqdm(self.workload.datasets.items(), desc="count", unit="dataset", leave=False):
            self.forward[name] = forward_flops(self.model, name, work.grid)
            if traffic:
                moved[name] = footprint(self._one_call, name, work.grid, some)
                self.kept[name] = moved[name].kept_bytes / some
            else:
                self.kept[name] = kept_bytes(self._one_call, name, work.grid, some) / some
        return moved

    def ceiling(self, ceiling: Ceiling, network: float = INFINIBAND) -> Plan:
        """The plan for GPUs of the table, in nodes of 8 with `network` GB/s each between them."""
        moved, train = self.count(traffic=True), self.recipe.train
        links, gradients = Interconnect(ceiling.gpu.link, network), float(FLOAT_BYTES * self.parameters)
        pieces = train.draws * -(-train.batch // self.processes // self.micro_batch)
        windows = train.global_batch / self.processes
        times = {}
        for name in self.workload.datasets:
            rounds = self._mean(name, lambda calls: forward_passes(calls, self.recipe.finetune))
            calls = rounds / forward_passes(1, None)  # as many forward and backward passes
            state = STATE_TOUCHES * FLOAT_BYTES * self.parameters
            seconds = ceiling.seconds(
                windows * rounds * self.forward[name],
                windows / min(2, self.micro_batch) * calls * moved[name].moved_bytes + state,
                pieces * calls * moved[name].operations,
            )
            backward = BACKWARD / rounds * seconds / pieces  # the last one, in which gradients get their final value
            exposed = links.after_backward(buckets(gradients), backward, self.processes)
            times[name] = Measured(seconds + exposed, 0, False, exposed)
        exchange, gpu = None, ceiling.gpu
        if self.processes > 1:
            sent = sum(links.all_reduce(size, self.processes) for size in buckets(gradients))
            exchange = Exchange(gradients, sent, links.link, links.network)
        kind = f"{gpu.bf16_tflops:g} TFLOP/s bf16" if self.bf16 else f"{gpu.float32_tflops:g} TFLOP/s float32"
        machine = f"{gpu.name}: {kind}, {gpu.bandwidth:g} GB/s, {gpu.memory:g} GB"
        return self._plan(machine, 1e9 * gpu.memory, times, ceiling.utilisation, exchange)

    def probe(self, seconds: float) -> Plan:
        """The plan for this machine, by a probe of about so many seconds."""
        self.count(traffic=False)
        memory = local_memory_bytes()
        tokens = {name: work.source.tokens for name, work in self.workload.datasets.items()}
        kept = {name: self._held(name) / tokens[name] for name in tokens}
        times = Probe(self.workload, self.processes, kept, memory).measure(seconds)
        grown = {}
        for name, measured in times.items():  # at full length
            full = forward_passes(self.recipe.window_length(name) - 1, self.recipe.finetune)
            mean = self._mean(name, lambda calls: forward_passes(calls, self.recipe.finetune))
            grown[name] = Measured(measured.seconds * mean / full, measured.steps, measured.extrapolated)
        if torch.cuda.is_available():
            machine = f"this machine, measured: {torch.cuda.get_device_name()}"
        else:
            machine = f"this machine, measured: CPU, {torch.get_num_threads()} threads"
        return self._plan(machine, memory, grown, None, None)

    def _held(self, name: str) -> float:
        """Bytes of activations of one window."""
        return self.kept[name] * held_calls(self.recipe.window_length(name) - 1, self.recipe.finetune)

    def _mean(self, name: str, of_calls: Callable[[int], float]) -> float:
        """Mean over the run of what depends on how many model calls a window takes."""
        finetune, steps = self.recipe.finetune, self.recipe.train.steps
        if finetune is None:
            return of_calls(1)
        some = np.linspace(0, steps - 1, min(steps, 1000)).astype(int).tolist()
        return float(np.mean([of_calls(unroll_length(step, steps, finetune, name)) for step in some]))

    def _plan(
        self,
        machine: str,
        memory: float,
        times: Mapping[str, Measured],
        utilisation: float | None,
        exchange: Exchange | None,
    ) -> Plan:
        recipe, train = self.recipe, self.recipe.train
        works = self.workload.datasets.values()
        state = FLOAT_BYTES * self.parameters * (COPIES + (self.processes > 1))
        per_window = max(self._held(work.name) + work.window_bytes for work in works)
        fitting = int(max(0.0, USABLE * memory - state) // per_window)
        one_call = max(self.kept[work.name] + work.window_bytes for work in works)
        counts = self.mixing.schedule.counts(train.steps * train.draws)
        return Plan(
            run=recipe.run.name,
            published=not any(work.measured_shards for work in works),
            machine=machine,
            steps=train.steps,
            global_batch=train.global_batch,
            processes=self.processes,
            parameters=self.parameters,
            state_bytes=state,
            input_bytes=self.micro_batch * max(work.window_bytes for work in works),
            memory_bytes=memory,
            utilisation=utilisation,
            exchange=exchange,
            validations=_validations(recipe),
            checkpoint_bytes=4 * FLOAT_BYTES * self.parameters,  # weights, average, two moments
            checkpoints=_checkpoints(recipe),
            micro_batch=self.micro_batch,
            fitting_micro_batch=fitting,
            checkpointing_helps=recipe.finetune is not None and one_call < 0.9 * per_window,
            datasets={work.name: self._dataset(work, counts[work.name], times[work.name]) for work in works},
            notes=self.workload.notes,
        )

    def _dataset(self, work: DatasetWork, draws: int, time: Measured) -> DatasetPlan:
        train, name = self.recipe.train, work.name
        validation, schedule = self.recipe.validation, self.mixing.schedule
        own = self.model.parameters_by_datasets().get(frozenset({name}), [])
        return DatasetPlan(
            grid=work.grid,
            windows=work.source.windows,
            share=schedule.shares[name],
            draws=draws,
            passes=draws * schedule.batch / work.source.windows,
            own_parameters=sum(parameter.numel() for parameter in own) if len(self.model.specs) > 1 else 0,
            tokens=train.global_batch * self._mean(name, float) * work.grid[0] * work.grid[1] / PATCH,
            flops=train.global_batch
            * self.forward[name]
            * self._mean(name, lambda calls: forward_passes(calls, self.recipe.finetune)),
            read_bytes=train.global_batch * work.window_bytes,
            activation_bytes=self.micro_batch * self._held(name),
            seconds=time.seconds,
            extrapolated=time.extrapolated,
            validation_calls=validation.windows + validation.rollouts * (work.frames - 1) if validation.every else 0,
            forward_flops=self.forward[name],
            exchange_seconds=time.exchange,
        )


def local_memory_bytes() -> float:
    """Memory of this machine's GPU, or on a CPU what is available."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(psutil.virtual_memory().available)


def local_bf16(recipe: Recipe) -> bool:
    """Whether products are bf16 on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return autocast_dtype(recipe.train.precision, device) is not None


def _validations(recipe: Recipe) -> int:
    """How many validations the run has: every so many steps, and at the end of a run that is longer."""
    every, steps = recipe.validation.every, recipe.train.steps
    return steps // every + (steps > every and steps % every > 0) if every else 0


def _checkpoints(recipe: Recipe) -> int:
    """How many checkpoints are on disk at the end."""
    settings, steps = recipe.checkpoint, recipe.train.steps
    saved = {*range(settings.every, steps + 1, settings.every), steps}
    newest = sorted(saved)[-settings.keep :]
    return len({*newest, *(step for step in saved if settings.keep_every and step % settings.keep_every == 0)})

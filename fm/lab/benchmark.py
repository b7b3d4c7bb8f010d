"""Ways to take the same step: each a short list of recipe overrides.

What is measured: the datasets of a recipe at their published grids or the mini-Well's, without any data.

The machine that a benchmark runs on: its device, its versions, and how busy it is.

What a machine can do at most: matrix products of a dtype, and memory traffic; measured, or as data sheets say.

Whether shards are read fast enough: the trainer's loader feeds a consumer, which says how long it waited.

On a CPU the consumer sleeps as long as a step of the aim takes; on a GPU it takes real steps, each to its end.

The least time that a step could take: a roofline over what it must compute and move.

Each matrix product and convolution of forward and backward pass takes the longer of its arithmetic, at the ceiling of
the dtype in which it is taken, and of reading its operands and writing its results once. Everything else in the passes
is free, as if fused with its neighbours. Clip, AdamW and averaged weights take what they read and write.

What a benchmark found: a row for each dataset and variant, and the ceilings that it is compared with.

Steps of variants and datasets in turn, so that whatever else the machine does meanwhile meets all of them alike.

On a CPU all variants take turns. On a GPU they come one after another, since each would take memory from the others.

What the steps of a workload compute, move and keep, counted once for each precision and scaled to a batch.

Where a step's time goes: torch's profiler over a few steps, as a Chrome trace and a table of the top kernels.

Rows of a benchmark: trials beside what their steps compute and move, and the mixture of each variant.

`fm benchmark`: steps of a recipe measured, or their floor on a GPU of the table.
"""

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from data_pipeline.files import UserError
from data_pipeline.miniwell.task import EIGHT, SYSTEMS, load_system
from data_pipeline.registry import Card, load_registry
from data_pipeline.schema import nearest
from data_pipeline.tables import markdown
from data_pipeline.windows.loader import scheduled_batches, sources
from data_pipeline.windows.reader import Batch
from data_pipeline.windows.schedule import Division
from data_pipeline.workers import available_cores
from fm.config import Recipe, load_recipe
from fm.datasets import build_model, open_split
from fm.distributed import autocast_dtype, make_accelerator, precision
from fm.lab.hardware import STATE_TOUCHES, Gpu, find_gpu
from fm.lab.plan import FLOAT_BYTES, Footprint, Product, Workload, footprint, planned_config, published_work
from fm.lab.plan_tables import PAPER_STEPS, digits
from fm.model.attention import linear
from fm.training.mixing import Mixing
from fm.training.objective import Unroll
from fm.training.state import TrainingState
from fm.training.step import PHASES, DryRun, StepSeconds, train_step

NONE = "none"


@dataclass(frozen=True)
class Variant:
    """One way, and on which devices it is measured unless --variants says otherwise."""

    name: str
    overrides: tuple[str, ...]
    default_on: tuple[str, ...] = ("cuda",)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("float32", ("train.precision=float32", "train.compile=eager"), default_on=("cpu", "cuda")),
        Variant("bf16", ("train.precision=bf16", "train.compile=eager"), default_on=("cpu", "cuda")),
        Variant("blocks", ("train.precision=bf16", "train.compile=blocks")),
        Variant("step", ("train.precision=bf16", "train.compile=step")),
        Variant("graphs", ("train.precision=bf16", "train.compile=graphs")),
        Variant("batch4", ("train.global_batch=4",), default_on=()),
        Variant("batch8", ("train.global_batch=8",), default_on=("cpu", "cuda")),
        Variant("batch16", ("train.global_batch=16",)),
    )
}


def chosen_variants(names: Sequence[str] | None, device: str) -> list[Variant]:
    """The named variants, or those that are measured on this device by default; the one name `none` is no variant.

    UserError, with the nearest, for another name.
    """
    if names and list(names) == [NONE]:
        return []
    for name in names or ():
        if name not in VARIANTS:
            raise UserError(f"--variants: no variant {name!r}. {nearest(name, [*VARIANTS, NONE])}")
    return [one for one in VARIANTS.values() if (one.name in names if names else device in one.default_on)]


Size = Literal["full", "mini"]


def sized_workload(recipe: Recipe, size: Size, datasets: Sequence[str] | None = None) -> Workload:
    """The recipe's workload with grids and windows from the cards, or from the mini-Well's presets.

    `datasets` are some of the recipe's, which without any are the eight. UserError for an unknown one, and for one that
    has no such size.
    """
    registry = load_registry(recipe.data.registry)
    known = recipe.data.datasets or list(EIGHT)
    for name in datasets or ():
        if name not in known:
            raise UserError(f"--datasets: {name!r} is none of the recipe's datasets. {nearest(name, known)}")
    cards = [registry.card(name) for name in sorted({*(datasets or known)})]
    works = [published_work(recipe, card if size == "full" else _mini(card)) for card in cards]
    config, notes = planned_config(recipe)
    return Workload(recipe, {work.name: work for work in works}, config, tuple(notes))


def _mini(card: Card) -> Card:
    """The card as the mini-Well's simulation of the dataset would have it."""
    if card.name not in SYSTEMS:
        raise UserError(f"--grid mini: the mini-Well has no {card.name}; take --grid full, or other --datasets")
    preset = load_system(card.name).presets["mini"]
    trajectories = sum(one.num_trajectories["train"] for one in preset.parameter_sets)
    return replace(card, grid=preset.grid, train=((trajectories, preset.num_frames),))


DEVICES = ("auto", "cpu", "cuda")


def chosen_device(name: str) -> str:
    """cpu or cuda. UserError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; take --device cpu, or --gpu NAME for the floor alone")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def machine(device: str) -> dict[str, Any]:
    """Device, cores, threads, load and versions, as JSON."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "cpu": _cpu(),
        "cores": available_cores(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9}
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


CEILING_SECONDS = 0.3  # of each measurement, about
LEAST_CALLS = 5  # times that each is taken
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes: far more than caches hold


@dataclass(frozen=True)
class Ceilings:
    """Rates that no step exceeds."""

    flops: Mapping[str, float]  # FLOP/s of a large matrix product: float32, bfloat16, and on some GPUs tf32
    bandwidth: float  # bytes read and written per second
    of: str  # whose, and how they were found

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The least time of a product of tensors of `dtype`: arithmetic and memory traffic at the same time."""
        return max(flops / self.rate(dtype), moved / self.bandwidth)

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of products of this dtype."""
        return self.flops["bfloat16" if dtype in (torch.bfloat16, torch.float16) else "float32"]


def data_sheet(gpu: Gpu) -> Ceilings:
    """The ceilings that the vendor states."""
    rates = {"float32": 1e12 * gpu.float32_tflops, "bfloat16": 1e12 * gpu.bf16_tflops}
    return Ceilings(rates, 1e9 * gpu.bandwidth, f"{gpu.name}, data sheet")


def measure_ceilings(device: torch.device) -> Ceilings:
    """The best of a second of large matrix products, on random numbers, and large copies."""
    side = SIDE[device.type]
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rates[name] = 2 * side**3 / _product_seconds(side, dtype, device)
    if device.type == "cuda":
        with precision(torch.bfloat16):
            rates["tf32"] = 2 * side**3 / _product_seconds(side, torch.float32, device)
    source = torch.randn(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * COPIED[device.type] / _best(lambda: target.copy_(source), device)
    return Ceilings(rates, copied, "measured in this run")


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return _best(lambda: linear(left, right), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the least of many."""
    work()  # where memory is touched for the first time
    times: list[float] = []
    while len(times) < LEAST_CALLS or sum(times) < CEILING_SECONDS:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


WORKERS = (0, 1, 2, 4)
FEEDING_WARM_UP = 5  # steps that do not count
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
        steps = max(FEEDING_WARM_UP, round(seconds / max(self.step_seconds, 1e-3)))
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
            stop=FEEDING_WARM_UP + steps,
            workers=workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        meter = _Meter(batches)
        for step in range(FEEDING_WARM_UP + steps):
            if step == FEEDING_WARM_UP:
                meter.reset()
            if state is None:
                for _ in islice(meter, len(self._division.micro_batches(step))):
                    pass
                time.sleep(self.step_seconds)
            else:
                train_step(self.recipe, state, self._division, meter, accelerator, step)
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


KINDS = ("linear", "attention", "depthwise")  # fm/training/flops.py's


@dataclass(frozen=True)
class Floor:
    """Seconds of each part, and of the whole how many are memory traffic rather than arithmetic."""

    linear: float
    attention: float
    depthwise: float
    optimizer: float
    traffic: float

    @property
    def seconds(self) -> float:
        return self.linear + self.attention + self.depthwise + self.optimizer


def floor(products: Sequence[Product], parameters: int, ceilings: Ceilings) -> Floor:
    """The floor of a step with these products that moves so many parameters."""
    parts, traffic = dict.fromkeys(KINDS, 0.0), 0.0
    for one in products:
        seconds = ceilings.seconds(one.flops, one.bytes, one.dtype)
        parts[one.kind] += seconds
        traffic += seconds if seconds > one.flops / ceilings.rate(one.dtype) else 0.0
    optimizer = STATE_TOUCHES * FLOAT_BYTES * parameters / ceilings.bandwidth
    return Floor(**parts, optimizer=optimizer, traffic=traffic + optimizer)


MIXTURE = "mixture"
NOISY = 0.2  # spread above which a figure says little


@dataclass(frozen=True)
class Work:
    """What a step is by count; for the mixture the mean at the recipe's sampling shares."""

    windows: float
    tokens: float  # token updates: windows x model steps x tokens of a frame
    flops: float  # of matrix products and convolutions, forward and backward
    moved_bytes: float  # by all other operations, none fused with another
    floor: Floor


@dataclass(frozen=True)
class Row:
    """A dataset, or the mixture, under a variant. Without `seconds` nothing was measured, and `reason` says why."""

    dataset: str
    variant: str
    dtype: str  # of the products: float32 or bfloat16
    grid: tuple[int, int] | None  # (H, W); None for the mixture
    work: Work
    seconds: StepSeconds | None  # medians
    spread: float = 0.0  # half the distance of the quartiles of the whole step, over its median
    steps: int = 0  # that count
    memory: float | None = None  # peak bytes on the GPU
    reason: str = ""

    def tokens_per_s(self) -> float | None:
        return self.work.tokens / self.seconds.whole if self.seconds else None

    def flops_per_s(self) -> float | None:
        return self.work.flops / self.seconds.whole if self.seconds else None

    def bytes_per_s(self) -> float | None:
        return self.work.moved_bytes / self.seconds.whole if self.seconds else None

    def hours(self) -> float | None:
        """Of a million steps."""
        return PAPER_STEPS * self.seconds.whole / 3600 if self.seconds else None

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """The row with the keys that launch/README.md lists; null where nothing was measured."""
        flops, moved = self.flops_per_s(), self.bytes_per_s()
        milliseconds = {
            f"{'step' if phase == 'whole' else phase}_ms": 1e3 * getattr(self.seconds, phase) if self.seconds else None
            for phase in (*PHASES, "whole")
        }
        return {
            "dataset": self.dataset,
            "variant": self.variant,
            "dtype": self.dtype,
            "grid": self.grid,
            "windows": self.work.windows,
            "tokens": self.work.tokens,
            "flops": self.work.flops,
            "moved_bytes": self.work.moved_bytes,
            **milliseconds,
            "noise_percent": 100 * self.spread if self.seconds else None,
            "steps": self.steps,
            "tokens_per_s": self.tokens_per_s(),
            "tflops_per_s": flops / 1e12 if flops else None,
            "share_of_flops_ceiling": flops / ceilings.flops[self.dtype] if flops else None,
            "gb_per_s": moved / 1e9 if moved else None,
            "share_of_bandwidth_ceiling": moved / ceilings.bandwidth if moved else None,
            "peak_memory_gb": self.memory / 1e9 if self.memory else None,
            "floor_ms": 1e3 * self.work.floor.seconds,
            "floor_parts_ms": {name: 1e3 * seconds for name, seconds in asdict(self.work.floor).items()},
            "hours_per_million_steps": self.hours(),
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class Benchmark:
    """All of it."""

    recipe: str  # its file
    size: str  # full or mini
    machine: Mapping[str, Any]
    ceilings: Ceilings
    parameters: int
    shares: Mapping[str, float]  # of the draws, by dataset
    rows: tuple[Row, ...]
    feeding: tuple[Fed, ...] = ()
    pace: str = ""  # of the consumer that was fed
    profiles: tuple[str, ...] = ()  # files

    def warnings(self) -> list[str]:
        """What to keep in mind about the figures."""
        found = []
        load, cores = self.machine.get("load", 0.0), self.machine.get("cores", 1)
        if load > cores:
            found.append(f"a load of {load:.1f} on {cores} cores: others are at work on this machine")
        noisy = [row for row in self.rows if row.spread > NOISY]
        if noisy:
            worst = max(noisy, key=lambda row: row.spread)
            found.append(
                f"{len(noisy)} of {len(self.rows)} rows vary by more than {NOISY:.0%}, {worst.dataset} under "
                f"{worst.variant} by {worst.spread:.0%}: measure again when the machine is idle, or longer (--seconds)"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        rows = [row.to_json(self.ceilings) for row in self.rows]
        whole = asdict(self) | {"rows": rows, "warnings": self.warnings()}
        plain: dict[str, Any] = json.loads(json.dumps(whole))
        return plain


def medians(times: Sequence[StepSeconds]) -> StepSeconds:
    """Of each phase for itself."""
    return StepSeconds(**{name: median(getattr(one, name) for one in times) for name in (*PHASES, "whole")})


def spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles over the median; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def mean_of(parts: Sequence[Any], kind: Any, shares: Sequence[float]) -> Any:
    """A dataclass of numbers, or of such dataclasses, whose values are means at the shares."""

    def of(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Floor):
            return mean_of(values, Floor, shares)
        return sum(share * value for share, value in zip(shares, values, strict=True))

    return kind(**{name: of(name) for name in [one.name for one in fields(kind)]})


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
    """A variant with a model, an optimizer and averages of its own, and a step of every dataset."""

    def __init__(self, trials: Sequence[Trial], workload: Workload, accelerator: Accelerator) -> None:
        recipe = trials[0].recipe
        self.device = accelerator.device
        self.state = TrainingState(recipe, workload.model(), accelerator, None)
        works = [workload.datasets[trial.dataset] for trial in trials]
        dry_runs = [DryRun(recipe, work.spec, work.grid, accelerator) for work in works]
        self.steps = list(zip(trials, dry_runs, strict=True))

    def warm_up(self) -> float:
        """Steps that do not count; those that cannot be taken leave their reason. Returns seconds of the last round."""
        begun = time.perf_counter()
        for _ in range(WARM_UP[self.device.type]):
            begun = time.perf_counter()
            for trial, dry_run in self.steps:
                if not trial.reason:
                    self._try(trial, dry_run)
        return time.perf_counter() - begun

    def _try(self, trial: Trial, dry_run: DryRun) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            dry_run.step(self.state).read()
        except RuntimeError as error:  # out of memory, or no compiler
            trial.reason = _first_line(error)
            self.state.parallel.zero_grad()
            return
        if self.device.type == "cuda":
            trial.memory = float(torch.cuda.max_memory_allocated(self.device))

    def round(self) -> None:
        """A turn of each dataset."""
        for trial, dry_run in self.steps:
            if not trial.reason:
                timers = [dry_run.step(self.state) for _ in range(TURN[self.device.type])]
                trial.times.extend(timer.read() for timer in timers)


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


class Counts:
    """Footprints of the workload's steps by dataset; each is that of `windows` windows."""

    def __init__(self, workload: Workload, precisions: set[torch.dtype | None]) -> None:
        """`precisions` are what products are cast to, None is float32. Shows a progress bar."""
        recipe = workload.recipe
        model = workload.fake_model()
        self.parameters = model.num_parameters()
        self.windows = recipe.train.global_batch
        self._workload = workload
        self._found: dict[tuple[str, torch.dtype | None], Footprint] = {}
        everything = [(work, dtype) for dtype in sorted(precisions, key=str) for work in workload.datasets.values()]
        for work, dtype in tqdm(everything, desc="count", unit="dataset", leave=False):
            objective = Unroll(model, recipe.loss, recipe.finetune, dtype)
            calls = recipe.window_length(work.name) - 1
            self._found[work.name, dtype] = footprint(objective, work.name, work.grid, self.windows, calls)

    def work(self, dataset: str, dtype: torch.dtype | None, recipe: Recipe, ceilings: Ceilings) -> Work:
        """A dataset's step with the windows of `recipe`, a variant of the workload's."""
        one, windows = self._found[dataset, dtype], recipe.train.global_batch
        times = windows / self.windows
        products = [replace(it, flops=int(it.flops * times), bytes=int(it.bytes * times)) for it in one.products]
        calls = recipe.window_length(dataset) - 1
        return Work(
            windows=windows,
            tokens=windows * calls * self._workload.datasets[dataset].source.tokens,
            flops=sum(product.flops for product in products),
            moved_bytes=one.moved_bytes * times,
            floor=floor(products, self.parameters, ceilings),
        )


STEPS = 3
ROWS = 25
NAME_WIDTH = 70


def profile_step(
    name: str, recipe: Recipe, workload: Workload, dataset: str, accelerator: Accelerator, folder: Path
) -> Path:
    """Profile a dataset's step; writes <name>-<dataset>.json, for chrome://tracing or Perfetto, and .md beside it.

    Returns the table's path. UserError where the folder cannot be written.
    """
    on_gpu = accelerator.device.type == "cuda"
    state, work = TrainingState(recipe, workload.model(), accelerator, None), workload.datasets[dataset]
    dry_run = DryRun(recipe, work.spec, work.grid, accelerator)
    for _ in range(WARM_UP[accelerator.device.type]):
        dry_run.step(state).read()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(STEPS):
            dry_run.step(state)
        if on_gpu:
            torch.cuda.synchronize()
    table = folder / f"{name}-{dataset}.md"
    title = f"{name}, {dataset}, {work.grid[0]} x {work.grid[1]}, {recipe.train.global_batch} windows a step"
    try:
        found.export_chrome_trace(str(table.with_suffix(".json")))
        table.write_text(f"{title}\n\n{_kernels(found, on_gpu)}\n")
    except (OSError, RuntimeError) as error:
        raise UserError(f"--profile: cannot write into {folder}: {error}") from error
    return table


def _kernels(found: profile, on_gpu: bool) -> str:
    """The kernels, on a CPU the operators, with the most time of their own."""
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in found.key_averages()
        if event.device_type == kind
    }
    total = sum(spent for spent, _ in times.values())
    top = sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]
    body = [
        [key[:NAME_WIDTH], f"{count / STEPS:g}", digits(spent / STEPS / 1e3), f"{100 * spent / total:.1f}"]
        for key, (spent, count) in top
        if spent > 0
    ]
    return markdown(["kernel" if on_gpu else "operator", "calls", "ms a step", "share %"], body)


DTYPES = {None: "float32", torch.bfloat16: "bfloat16"}


def measured_rows(
    trials: Sequence[Trial], workload: Workload, counts: Counts, ceilings: Ceilings, device: torch.device
) -> list[Row]:
    """A row for each trial, those of a variant together and followed by their mixture."""
    rows = []
    for variant in dict.fromkeys(trial.variant for trial in trials):
        own = [trial for trial in trials if trial.variant == variant]
        found = [_row(trial, workload, counts, ceilings, device) for trial in own]
        rows += [*found, mixture(found, workload, own)]
    return rows


def floor_rows(dtype: torch.dtype | None, workload: Workload, counts: Counts, ceilings: Ceilings) -> list[Row]:
    """Rows that are counted and not measured."""
    rows, name, reason = [], DTYPES[dtype], "counted, not measured"
    for work in workload.datasets.values():
        counted = counts.work(work.name, dtype, workload.recipe, ceilings)
        rows.append(Row(work.name, name, name, work.grid, counted, None, reason=reason))
    return [*rows, mixture(rows, workload)]


def mixture(rows: Sequence[Row], workload: Workload, trials: Sequence[Trial] = ()) -> Row:
    """Expected values at the sampling shares.

    Of a mixture in which a dataset has not been measured, nothing is.
    """
    first, shares = rows[0], workload.mixing().schedule.shares
    weights = [shares[row.dataset] for row in rows]
    work = mean_of([row.work for row in rows], Work, weights)
    missing = [row for row in rows if row.seconds is None]
    if missing:
        alike = len({row.reason for row in rows}) == 1
        reason = first.reason if alike else f"without {', '.join(row.dataset for row in missing)}"
        return Row(MIXTURE, first.variant, first.dtype, None, work, None, reason=reason)
    seconds = mean_of([row.seconds for row in rows], StepSeconds, weights)
    rounds = zip(*([one.whole for one in trial.times] for trial in trials), strict=True)
    whole = [sum(weight * one for weight, one in zip(weights, each, strict=True)) for each in rounds]
    memory = max((row.memory for row in rows if row.memory is not None), default=None)
    steps = sum(row.steps for row in rows)
    return Row(MIXTURE, first.variant, first.dtype, None, work, seconds, spread(whole), steps, memory)


def _row(trial: Trial, workload: Workload, counts: Counts, ceilings: Ceilings, device: torch.device) -> Row:
    dtype = autocast_dtype(trial.recipe.train.precision, device)
    work = counts.work(trial.dataset, dtype, trial.recipe, ceilings)
    grid = workload.datasets[trial.dataset].grid
    if not trial.times:
        return Row(trial.dataset, trial.variant, DTYPES[dtype], grid, work, None, reason=trial.reason)
    noise = spread([one.whole for one in trial.times])
    seconds, steps = medians(trial.times), len(trial.times)
    return Row(trial.dataset, trial.variant, DTYPES[dtype], grid, work, seconds, noise, steps, trial.memory)


RECIPES = {"cpu": Path("recipes/quickstart.yaml"), "cuda": Path("recipes/fm_pretrain.yaml")}
SIZES: dict[str, Size] = {"cpu": "mini", "cuda": "full"}
SECONDS = {"cpu": 45.0, "cuda": 300.0}
ROOT = Path(__file__).parents[2]
CPU_ONLY = "ACCELERATE_USE_CPU"


@dataclass(frozen=True)
class Request:
    """What to measure; None is the default of the device."""

    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    size: Size | None = None
    datasets: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None
    seconds: float | None = None  # of taking steps, about
    profile: Path | None = None  # folder; also profile a step of each variant
    shards: str | None = None  # also feed a consumer from these
    step_seconds: float = 0.036  # the consumer's pace where it does not compute
    feed_seconds: float = 10.0  # of each number of workers, about


def benchmark(request: Request) -> Benchmark:
    """Measure what is asked for. UserError for what the request gets wrong, before anything is measured."""
    device = chosen_device(request.device)
    variants = chosen_variants(request.variants, device)
    file = _recipe_file(request.recipe, device)
    recipe = load_recipe(file, request.overrides)
    recipes = {one.name: load_recipe(file, [*request.overrides, *one.overrides]) for one in variants}
    size = request.size or SIZES[device]
    workload = sized_workload(recipe, size, request.datasets)
    feed = Feed(recipe, request.shards, request.step_seconds) if request.shards else None
    with _on(device):
        accelerator = make_accelerator(recipe.train.clip)
        where, ceilings = machine(device), measure_ceilings(accelerator.device)
        precisions = {autocast_dtype(one.train.precision, accelerator.device) for one in recipes.values()}
        counts = Counts(workload, precisions)
        seconds = request.seconds or SECONDS[device]
        trials = run_trials(recipes, workload, accelerator, seconds, whatever_it_takes=request.variants is not None)
        rows = measured_rows(trials, workload, counts, ceilings, accelerator.device)
        fed = feed.measure(accelerator, request.feed_seconds) if feed else []
        profiles = _profiles(rows, recipes, workload, accelerator, request.profile) if request.profile else []
    return Benchmark(
        recipe=str(file),
        size=size,
        machine=where,
        ceilings=ceilings,
        parameters=counts.parameters,
        shares=workload.mixing().schedule.shares,
        rows=tuple(rows),
        feeding=tuple(fed),
        pace=feed.pace(device) if feed else "",
        profiles=tuple(profiles),
    )


def floors(gpu: str, request: Request) -> Benchmark:
    """The floor of every dataset on a GPU of the table: counted, not run. UserError as for `benchmark`."""
    ceilings = data_sheet(find_gpu(gpu))
    file = _recipe_file(request.recipe, "cuda")
    recipe = load_recipe(file, request.overrides)
    size = request.size or SIZES["cuda"]
    workload = sized_workload(recipe, size, request.datasets)
    dtype = None if recipe.train.precision == "float32" else torch.bfloat16
    counts = Counts(workload, {dtype})
    return Benchmark(
        recipe=str(file),
        size=size,
        machine={"device": gpu.lower()},
        ceilings=ceilings,
        parameters=counts.parameters,
        shares=workload.mixing().schedule.shares,
        rows=tuple(floor_rows(dtype, workload, counts, ceilings)),
    )


def _recipe_file(given: Path | None, device: str) -> Path:
    """The recipe that is asked for, or the device's own: in this folder, or in the clone that this package is in."""
    if given is not None:
        return given
    default = RECIPES[device]
    for folder in (Path(), ROOT):
        if (folder / default).exists():
            return default if folder == Path() else folder / default
    raise UserError(f"fm benchmark: no {default} here; name a recipe with --recipe")


def _profiles(
    rows: Sequence[Row], recipes: Mapping[str, Recipe], workload: Workload, accelerator: Accelerator, folder: Path
) -> list[str]:
    """Profile the longest step of each variant."""
    tables = []
    for variant, recipe in recipes.items():
        own = {row.dataset: row.seconds.whole for row in rows if row.variant == variant and row.seconds and row.grid}
        if own:
            longest = max(own, key=lambda dataset: own[dataset])
            tables.append(str(profile_step(variant, recipe, workload, longest, accelerator, folder)))
    return tables


@contextmanager
def _on(device: str) -> Iterator[None]:
    """Let accelerate take this device."""
    before = os.environ.get(CPU_ONLY)
    if device == "cpu":
        os.environ[CPU_ONLY] = "true"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CPU_ONLY, None)
        else:
            os.environ[CPU_ONLY] = before

"""`fm benchmark`: how fast this machine trains, by dataset and variant, beside the least time that a step could take.

A variant is a list of recipe overrides. Steps are dry runs on random data (fm/lab/dry_runs.py), so no shards are
needed. Their work is counted (fm/lab/workload.py), and compared with what the machine can do at most, or with the data
sheet of a GPU (fm/lab/hardware.py).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from pydantic_core import to_jsonable_python

from data_pipeline.errors import UserError
from data_pipeline.progress import progress_bar
from data_pipeline.schema import nearest
from fm.config import Recipe
from fm.datasets import load_own_recipe
from fm.distributed import autocast_dtype, make_accelerator
from fm.lab.data_wait import DataWait, ShardLoader
from fm.lab.dry_runs import Measurement, measure_variants, profile_step
from fm.lab.hardware import PARTS, Ceilings, data_sheet, describe_machine, find_gpu, measure_ceilings, roofline
from fm.lab.workload import PAPER_STEPS, Footprint, GridSize, Workload, footprint, sized_workload
from fm.training.dry_run import StepSeconds
from fm.training.objective import Unroll
from fm.training.step import PHASES

RECIPES = {"cpu": Path("recipes/quickstart.yaml"), "cuda": Path("recipes/fm_pretrain.yaml")}
SIZES: dict[str, GridSize] = {"cpu": "mini", "cuda": "full"}
SECONDS = {"cpu": 45.0, "cuda": 300.0}
ROOT = Path(__file__).parents[2]
MIXTURE = "mixture"
NONE = "none"  # the name of no variant
NOISY_PERCENT = 20


VARIANTS = {  # name -> recipe overrides
    "float32": ("train.precision=float32", "train.compile=eager"),
    "bf16": ("train.precision=bf16", "train.compile=eager"),
    "blocks": ("train.precision=bf16", "train.compile=blocks"),
    "step": ("train.precision=bf16", "train.compile=step"),
    "graphs": ("train.precision=bf16", "train.compile=graphs"),
    "batch4": ("train.global_batch=4",),
    "batch8": ("train.global_batch=8",),
    "batch16": ("train.global_batch=16",),
}
DEFAULT_VARIANTS = {
    "cpu": ("float32", "bf16", "batch8"),
    "cuda": ("float32", "bf16", "blocks", "step", "graphs", "batch8", "batch16"),
}


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure. None means the default of the device."""

    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    size: GridSize | None = None
    datasets: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None
    seconds: float | None = None  # of taking steps, about
    profile: Path | None = None  # folder; also profile a step of each variant
    shards: str | None = None  # also measure how long training waits for these shards
    step_seconds: float = 0.036  # of a step that is not computed, while waiting for shards is measured
    feed_seconds: float = 10.0  # of that measurement with each number of workers, about


@dataclass(frozen=True)
class Row:
    """A dataset, or the mixture, under a variant. If nothing was measured, times and rates are None.

    The mixture has means at the recipe's sampling shares. The fields are the keys of the JSON file.
    """

    dataset: str
    variant: str
    dtype: str  # of the products: float32 or bfloat16
    grid: tuple[int, int] | None  # (H, W); None for the mixture
    windows: float
    tokens: float  # token updates: windows x model calls x tokens of a frame
    flops: float  # of matrix products and convolutions, forward and backward
    moved_bytes: float  # by all other operations, none fused with another
    floor_ms: float  # the least time of a step
    floor_parts_ms: Mapping[str, float]
    data_ms: float | None = None  # median, like the other phases
    forward_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    step_ms: float | None = None
    noise_percent: float | None = None  # half the distance of the quartiles of the step, over its median
    steps: int = 0  # that count
    tokens_per_s: float | None = None
    tflops_per_s: float | None = None
    share_of_flops_ceiling: float | None = None
    gb_per_s: float | None = None
    share_of_bandwidth_ceiling: float | None = None
    peak_memory_gb: float | None = None  # of the GPU
    hours_per_million_steps: float | None = None
    reason: str | None = None  # why nothing was measured

    def timed(
        self, seconds: StepSeconds, ceilings: Ceilings, noise_percent: float, steps: int, peak_memory_gb: float | None
    ) -> "Row":
        """Return the row with measured times, and the rates that follow from them."""
        flops, moved = self.flops / seconds.whole, self.moved_bytes / seconds.whole
        return replace(
            self,
            **{f"{phase}_ms": 1e3 * getattr(seconds, phase) for phase in PHASES},
            step_ms=1e3 * seconds.whole,
            noise_percent=noise_percent,
            steps=steps,
            tokens_per_s=self.tokens / seconds.whole,
            tflops_per_s=flops / 1e12,
            share_of_flops_ceiling=flops / ceilings.flops[self.dtype],
            gb_per_s=moved / 1e9,
            share_of_bandwidth_ceiling=moved / ceilings.bandwidth,
            peak_memory_gb=peak_memory_gb,
            hours_per_million_steps=PAPER_STEPS * seconds.whole / 3600,
        )


@dataclass(frozen=True)
class Benchmark:
    """The result of a benchmark. The fields are the keys of the JSON file."""

    recipe: str  # its file
    size: GridSize
    machine: Mapping[str, Any]
    ceilings: Ceilings
    parameters: int
    shares: Mapping[str, float]  # of the draws, by dataset
    rows: tuple[Row, ...]
    feeding: Sequence[DataWait] = ()
    pace: str = ""  # of the steps, while waiting for shards was measured
    profiles: Sequence[str] = ()  # files

    def warnings(self) -> list[str]:
        """Return the reasons to doubt the figures."""
        found = []
        load, cores = self.machine.get("load", 0.0), self.machine.get("cores", 1)
        if load > cores:
            found.append(f"a load of {load:.1f} on {cores} cores: other processes use this machine")
        noise = {(row.dataset, row.variant): row.noise_percent or 0.0 for row in self.rows}
        noisy = {place: percent for place, percent in noise.items() if percent > NOISY_PERCENT}
        if noisy:
            dataset, variant = worst = max(noisy, key=lambda place: noisy[place])
            found.append(
                f"{len(noisy)} of {len(self.rows)} rows vary by more than {NOISY_PERCENT}%, {dataset} under {variant} "
                f"by {noisy[worst]:.0f}%: measure again when the machine is idle, or longer (--seconds)"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return all fields and the warnings."""
        plain: dict[str, Any] = to_jsonable_python(self)
        return plain | {"warnings": self.warnings()}


def benchmark(options: BenchmarkOptions) -> Benchmark:
    """Measure this machine. Raises UserError for wrong options before anything is measured."""
    device = _chosen_device(options.device)
    variants = chosen_variants(options.variants, device)
    file, size, workload = _read_options(options, device)
    recipes = {name: load_own_recipe(file, [*options.overrides, *VARIANTS[name]]) for name in variants}
    if options.profile is not None:
        try:
            options.profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--profile: cannot make the folder {options.profile}: {error.strerror}") from error
    loader = ShardLoader(workload.recipe, options.shards, options.step_seconds) if options.shards else None
    with patch_environment(ACCELERATE_USE_CPU="true") if device == "cpu" else nullcontext():
        accelerator = make_accelerator(workload.recipe.train.clip)
        machine, ceilings = describe_machine(device), measure_ceilings(accelerator.device)
        dtypes = {name: autocast_dtype(one.train.precision, accelerator.device) for name, one in recipes.items()}
        counts = _CountedSteps(workload, set(dtypes.values()))
        found = measure_variants(
            recipes, workload, accelerator, options.seconds or SECONDS[device], every=options.variants is not None
        )
        rows: list[Row] = []
        for name, recipe in recipes.items():
            counted = counts.rows(name, recipe.train.global_batch, dtypes[name], ceilings)
            rows += measured_rows(counted, found[name], counts.shares, ceilings)
        return Benchmark(
            recipe=str(file),
            size=size,
            machine=machine,
            ceilings=ceilings,
            parameters=counts.parameters,
            shares=counts.shares,
            rows=tuple(rows),
            feeding=loader.measure(accelerator, options.feed_seconds) if loader else (),
            pace=loader.pace(device) if loader else "",
            profiles=_profiles(rows, recipes, workload, accelerator, options.profile) if options.profile else (),
        )


def floors(gpu: str, options: BenchmarkOptions) -> Benchmark:
    """Return the least time of each dataset's step on a GPU of the table: counted, nothing runs.

    Raises UserError as `benchmark`.
    """
    ceilings = data_sheet(find_gpu(gpu))
    file, size, workload = _read_options(options, "cuda")
    dtype = None if workload.recipe.train.precision == "float32" else torch.bfloat16
    counts = _CountedSteps(workload, {dtype})
    rows = counts.rows(_dtype_name(dtype), workload.recipe.train.global_batch, dtype, ceilings)
    rows = [replace(row, reason="counted, not measured") for row in rows]
    rows.append(mixture(rows, counts.shares))
    machine = {"device": gpu.lower()}
    return Benchmark(str(file), size, machine, ceilings, counts.parameters, counts.shares, tuple(rows))


def chosen_variants(names: Sequence[str] | None, device: str) -> list[str]:
    """Return the named variants, or the device's default ones; the name `none` alone means no variants.

    Raises UserError, with the nearest name, for an unknown name.
    """
    if names and list(names) == [NONE]:
        return []
    for name in names or ():
        if name not in VARIANTS:
            raise UserError(f"--variants: no variant {name!r}. {nearest(name, [*VARIANTS, NONE])}")
    return [name for name in VARIANTS if name in (names or DEFAULT_VARIANTS[device])]


def _chosen_device(name: str) -> str:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU here; take --device cpu, or --gpu NAME for the floor alone")
    return name if name != "auto" else "cuda" if has_gpu else "cpu"


def _read_options(options: BenchmarkOptions, device: str) -> tuple[Path, GridSize, Workload]:
    """Return the recipe's file, the size of the grids, and the workload; the device has defaults of each."""
    file = options.recipe
    if file is None:
        folders = [folder for folder in (Path(), ROOT) if (folder / RECIPES[device]).exists()]
        if not folders:
            raise UserError(f"fm benchmark: no {RECIPES[device]} here; name a recipe with --recipe")
        file = folders[0] / RECIPES[device]
    size = options.size or SIZES[device]
    return file, size, sized_workload(load_own_recipe(file, options.overrides), size, options.datasets)


def _dtype_name(autocast: torch.dtype | None) -> str:
    return "float32" if autocast is None else str(autocast).removeprefix("torch.")


class _CountedSteps:
    """What the steps of a workload compute and move, by dataset and by the dtype of products (None is float32)."""

    def __init__(self, workload: Workload, dtypes: set[torch.dtype | None]) -> None:
        """Count each dataset's step, with a progress bar."""
        recipe, model = workload.recipe, workload.fake_model()
        self.parameters, self.shares = model.num_parameters(), workload.schedule().shares
        self._workload, self._windows = workload, recipe.train.global_batch
        self._calls = {name: recipe.unroll_steps(name) for name in workload.datasets}
        self._found: dict[tuple[str, torch.dtype | None], Footprint] = {}
        every = [(dataset, dtype) for dtype in sorted(dtypes, key=str) for dataset in workload.datasets.values()]
        for dataset, dtype in progress_bar(every, desc="count", unit="dataset", leave=False):
            objective = Unroll(model, recipe.loss, recipe.finetune, dtype)
            calls = self._calls[dataset.name]
            self._found[dataset.name, dtype] = footprint(objective, dataset.name, dataset.grid, self._windows, calls)

    def rows(self, variant: str, windows: int, dtype: torch.dtype | None, ceilings: Ceilings) -> list[Row]:
        """Return a row without times for each dataset's step of `windows` windows."""
        factor, rows = windows / self._windows, []
        for name, dataset in self._workload.datasets.items():
            found = self._found[name, dtype]
            products = [
                replace(one, flops=int(one.flops * factor), bytes=int(one.bytes * factor)) for one in found.products
            ]
            floor = {part: 1e3 * one for part, one in roofline(products, self.parameters, ceilings).items()}
            rows.append(
                Row(
                    dataset=name,
                    variant=variant,
                    dtype=_dtype_name(dtype),
                    grid=dataset.grid,
                    windows=windows,
                    tokens=windows * self._calls[name] * dataset.source.tokens,
                    flops=sum(one.flops for one in products),
                    moved_bytes=found.moved_bytes * factor,
                    floor_ms=sum(floor[part] for part in PARTS),
                    floor_parts_ms=floor,
                )
            )
        return rows


def measured_rows(
    counted: Sequence[Row], found: Mapping[str, Measurement], shares: Mapping[str, float], ceilings: Ceilings
) -> list[Row]:
    """Return the counted rows of a variant with the measurements of their datasets, followed by the mixture."""
    rows = []
    for row in counted:
        one = found[row.dataset]
        if one.times:
            noise = 100 * spread([step.whole for step in one.times])
            memory = one.memory / 1e9 if one.memory else None
            rows.append(row.timed(medians(one.times), ceilings, noise, len(one.times), memory))
        else:
            rows.append(replace(row, reason=one.reason))
    mixed = mixture(rows, shares)
    if all(row.step_ms is not None for row in rows):
        weights = [shares[row.dataset] for row in rows]
        typical = [medians(found[row.dataset].times) for row in rows]
        means = {name: fmean([getattr(one, name) for one in typical], weights) for name in (*PHASES, "whole")}
        rounds = zip(*([step.whole for step in found[row.dataset].times] for row in rows), strict=True)
        noise = 100 * spread([fmean(steps, weights) for steps in rounds])
        memory = max((row.peak_memory_gb for row in rows if row.peak_memory_gb), default=None)
        mixed = mixed.timed(StepSeconds(**means), ceilings, noise, sum(row.steps for row in rows), memory)
    return [*rows, mixed]


def mixture(rows: Sequence[Row], shares: Mapping[str, float]) -> Row:
    """Return the mixture of a variant's rows without times, and if a row has no times, the reason."""
    first, weights = rows[0], [shares[row.dataset] for row in rows]
    counted = ("windows", "tokens", "flops", "moved_bytes", "floor_ms")
    means: dict[str, Any] = {name: fmean([getattr(row, name) for row in rows], weights) for name in counted}
    parts = {part: fmean([row.floor_parts_ms[part] for row in rows], weights) for part in first.floor_parts_ms}
    missing = [row.dataset for row in rows if row.step_ms is None]
    alike = len({row.reason for row in rows}) == 1
    reason = first.reason if alike else f"without {', '.join(missing)}"
    return Row(MIXTURE, first.variant, first.dtype, None, **means, floor_parts_ms=parts, reason=reason)


def medians(times: Sequence[StepSeconds]) -> StepSeconds:
    """Return the median of each phase and of the whole step."""
    return StepSeconds(**{name: median(getattr(one, name) for one in times) for name in (*PHASES, "whole")})


def spread(values: Sequence[float]) -> float:
    """Return half the distance of the quartiles over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def _profiles(
    rows: Sequence[Row], recipes: Mapping[str, Recipe], workload: Workload, accelerator: Accelerator, folder: Path
) -> list[str]:
    """Profile the longest step of each variant, and return the files of the tables."""
    tables = []
    for variant, recipe in recipes.items():
        times = {row.dataset: row.step_ms for row in rows if row.variant == variant and row.step_ms and row.grid}
        if times:
            longest = max(times, key=lambda dataset: times[dataset])
            tables.append(str(profile_step(variant, recipe, workload, longest, accelerator, folder)))
    return tables

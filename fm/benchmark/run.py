"""`fm benchmark`: steps of a recipe measured, or their floor on a GPU of the table."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from data_pipeline.errors import UserError
from fm.benchmark.ceilings import data_sheet, measure_ceilings
from fm.benchmark.count import Counts
from fm.benchmark.feeding import Feed
from fm.benchmark.machine import chosen_device, machine
from fm.benchmark.profile import profile_step
from fm.benchmark.result import Benchmark, Row
from fm.benchmark.rows import floor_rows, measured_rows
from fm.benchmark.sizes import Size, sized_workload
from fm.benchmark.trial import run_trials
from fm.benchmark.variants import chosen_variants
from fm.planning.gpus import find_gpu
from fm.planning.workload import Workload
from fm.recipe_file import load_recipe
from fm.runtime import autocast_dtype, make_accelerator
from fm.settings import Recipe

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

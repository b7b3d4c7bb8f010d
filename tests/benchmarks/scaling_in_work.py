"""Measure how the time of a training step grows with its work: tokens, depth, width, model steps of an unroll, batch.

    python tests/benchmarks/scaling_in_work.py [--recipe R] [--grid 128] [--rounds 5] [--plot FILE.png] [key=value ...]

One quantity at a time is varied around a base: the recipe's model, one window of noise on a square grid, one model
step. Steps are dry runs of the trainer's own step (fm/training/step.py). Sizes take turns, and the first round does
not count. Width grows in heads, which keep their size. Fits use CPU time of one thread on a CPU, which other load
disturbs less, and wall-clock time on a GPU. Larger machines can train larger models: --recipe recipes/fm_pretrain.yaml.

    ms, clock  median over rounds, and (highest - lowest) / median of the fitted time as the noise
    system     part of the CPU time: the kernel hands out new pages of memory
    slope      of log time against log size, least squares over medians, with its standard error; last: between the two
               largest sizes alone
    fixed      a of time = a + b x size, least squares of relative errors; and its share of the smallest size's time
"""

import argparse
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import log, sqrt
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from data_pipeline.registry import PATCH
from fm.config import FinetuneSettings, Recipe, load_recipe
from fm.datasets import new_model
from fm.distributed import make_accelerator
from fm.lab.workload import read_workload
from fm.model.spec import ModelConfig
from fm.training.dry_run import DryRun, resized
from fm.training.state import TrainingState

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
DATASET = "shear_flow"
SIDES = (64, 96, 128, 192, 256, 384, 512)
DEPTHS, WIDENINGS, CALLS, BATCHES = (1, 2, 4, 8, 16), (0.5, 1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8)
MEASURED, FITTED = "#0072B2", "#D55E00"  # Okabe and Ito 2008


@dataclass
class Size:
    """One size of one quantity: a dry run and its times."""

    value: float
    name: str
    dry_run: DryRun
    state: TrainingState
    clock: list[float] = field(default_factory=list)  # seconds
    fitted: list[float] = field(default_factory=list)  # the seconds that fits look at
    system: list[float] = field(default_factory=list)  # CPU seconds in the kernel, which hands out fresh memory
    faults: list[int] = field(default_factory=list)  # pages of it

    @property
    def seconds(self) -> float:
        return median(self.fitted)

    @property
    def noise(self) -> float:
        return (max(self.fitted) - min(self.fitted)) / self.seconds


@dataclass(frozen=True)
class Fit:
    """A power law, and a line, of seconds against sizes."""

    slope: float  # of the logarithms
    error: float  # its standard error
    last: float  # slope between the two largest
    level: float  # seconds of the fitted power law at size 1
    fixed: float  # seconds that do not grow


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fit at least three sizes, in ascending order."""
    x, y = np.log(sizes), np.log(seconds)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * y).sum()) / spread
    rest = y - y.mean() - slope * (x - x.mean())
    error = sqrt(float((rest**2).sum()) / (len(x) - 2) / spread)
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    level = float(np.exp(y.mean() - slope * x.mean()))
    relative = np.stack([1 / np.array(seconds), np.array(sizes) / np.array(seconds)], axis=1)  # (n, 2)
    fixed = float(np.linalg.lstsq(relative, np.ones(len(sizes)), rcond=None)[0][0])
    return Fit(slope, error, last, level, fixed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="whose model is the base (default: quickstart)")
    parser.add_argument("--grid", type=int, default=128, help="points along a side of the base (default 128)")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="sides of the square grids")
    parser.add_argument("--rounds", type=int, default=5, help="that count (default 5)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the curves")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    assert recipe.model is not None
    accelerator = make_accelerator(recipe.train.clip)
    sweeps = make_sweeps(recipe, recipe.model, options, accelerator)
    began = os.getloadavg()[0]
    for number in range(options.rounds + 1):
        for size in [size for sizes in sweeps.values() for size in sizes]:
            take(size, accelerator, counts=number > 0)
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU, one thread"
    print(f"{device}; {options.rounds} rounds; load {began:.1f} to {os.getloadavg()[0]:.1f}")
    print(f"base: width {recipe.model.width}, depth {recipe.model.depth}, one window of {options.grid}^2 points\n")
    fits = {
        name: fit([size.value for size in sizes], [size.seconds for size in sizes]) for name, sizes in sweeps.items()
    }
    report(sweeps, fits)
    if options.plot:
        scaling_figure(sweeps, fits, device).savefig(options.plot, dpi=110)


def make_sweeps(
    recipe: Recipe, base: ModelConfig, options: argparse.Namespace, accelerator: Accelerator
) -> dict[str, list[Size]]:
    """Return the sizes of each quantity, by its name."""
    side = options.grid
    spec = read_workload(replace_data(recipe)).datasets[DATASET].spec

    def size(value: float, name: str, model: ModelConfig, side: int, windows: int = 1, calls: int = 1) -> Size:
        finetune = FinetuneSettings("", objective="bptt", unroll_steps=calls) if calls > 1 else None
        step = replace(resized(recipe, windows), model=model, finetune=finetune)
        state = TrainingState(step, new_model(model, [spec], 0, recipe.data.context), accelerator, None)
        return Size(value, name, DryRun(step, spec, (side, side), accelerator), state)

    def widened(factor: float) -> ModelConfig:
        return replace(base, width=int(factor * base.width), heads=int(factor * base.heads))

    return {
        "tokens": [size(side**2 / PATCH, f"{side} x {side}", base, side) for side in options.sides],
        "depth": [size(depth, str(depth), replace(base, depth=depth), side) for depth in DEPTHS],
        "width": [size(model.width, str(model.width), model, side) for model in map(widened, WIDENINGS)],
        "model steps K": [size(calls, str(calls), base, side, calls=calls) for calls in CALLS],
        "batch": [size(windows, str(windows), base, side, windows=windows) for windows in BATCHES],
    }


def replace_data(recipe: Recipe) -> Recipe:
    """Return the recipe with the one dataset, at its published size: no shards are needed."""
    return replace(recipe, data=replace(recipe.data, datasets=(DATASET,), shards="nowhere"))


def take(size: Size, accelerator: Accelerator, counts: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    whole = size.dry_run.step(size.state).read().whole
    after = resource.getrusage(resource.RUSAGE_SELF)
    if counts:
        size.clock.append(whole)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size.fitted.append(whole if accelerator.device.type == "cuda" else cpu)
        size.system.append(after.ru_stime - before.ru_stime)
        size.faults.append(after.ru_minflt - before.ru_minflt)


def report(sweeps: dict[str, list[Size]], fits: dict[str, Fit]) -> None:
    print("| varied | size | fitted, ms | noise | clock, ms | system, ms | page faults | slope to the next |")
    print(f"|:---|{'---:|' * 7}")
    for name, sizes in sweeps.items():
        for size, after in zip(sizes, [*sizes[1:], None], strict=True):
            slope = f"{log(after.seconds / size.seconds) / log(after.value / size.value):.2f}" if after else ""
            cells = [f"{1e3 * size.seconds:.1f}", f"{100 * size.noise:.0f} %", f"{1e3 * median(size.clock):.1f}"]
            cells += [f"{1e3 * median(size.system):.1f}", f"{median(size.faults):,.0f}", slope]
            print(f"| {name} | {size.name} | {' | '.join(cells)} |")
    print("\n| varied | slope | last | fixed, ms | of the smallest |\n|:---|---:|---:|---:|---:|")
    for name, found in fits.items():
        share = found.fixed / sweeps[name][0].seconds
        cells = [f"{found.slope:.2f} ± {found.error:.2f}", f"{found.last:.2f}", f"{1e3 * found.fixed:.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {100 * share:.0f} % |")


def scaling_figure(sweeps: dict[str, list[Size]], fits: dict[str, Fit], device: str) -> Figure:
    """Draw a panel for each quantity: medians, lowest and highest, and the power law."""
    figure = Figure(figsize=(2.2 * len(sweeps), 2.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sweeps), squeeze=False, sharey=True)[0]
    for axes, (name, sizes) in zip(panels, sweeps.items(), strict=True):
        x, y = np.array([size.value for size in sizes]), 1e3 * np.array([size.seconds for size in sizes])
        ends = 1e3 * np.array([[min(size.fitted), max(size.fitted)] for size in sizes])
        law = fits[name]
        axes.plot(x, 1e3 * law.level * x**law.slope, color=FITTED, linewidth=1.2)
        axes.errorbar(x, y, yerr=[y - ends[:, 0], ends[:, 1] - y], fmt="o", color=MEASURED, markersize=3.5, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        shown = x[:: 2 if len(x) > 5 else 1]
        axes.set_xticks(shown, [f"{value:,.0f}" for value in shown])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=7, width=0.5, length=2.5)
        axes.grid(True, which="major", linewidth=0.3, color="#D0D0D0")
        axes.set_title(f"{name}: slope {law.slope:.2f} ± {law.error:.2f}", fontsize=8)
    panels[0].set_ylabel("ms a training step", fontsize=8)
    figure.supxlabel(device, fontsize=8)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

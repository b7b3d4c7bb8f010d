"""Measure the CPU seconds that recipes need to reach an error on the mini-Well: a record that anyone can attack.

    python tests/benchmarks/speedrun.py [RECIPE ...] [--shards SHARDS] [--seeds 0 1 2] [--every 50] [--targets .36 .25]

Without a recipe, recipes/quickstart.yaml is measured. speedrun_unit.yaml, the first quickstart, is always run beside
them: its seconds to the first target are the unit. Runs take turns, so that other load meets all of them alike.

Rules:
1.  Data are the mini preset of the mini-Well, seed 0. A recipe may use its train split in any way, and nothing else: no
    pretrained weights, no other simulations, no test trajectory.
2.  The error is the one-step VRMSE of the averaged weights over persistence's: the median over all windows of the valid
    split, the geometric mean over the eight datasets, each at least 0.01.
3.  The clock counts the CPU seconds of all threads of the run, start and checkpoints included. Scoring is not counted.
4.  The error is measured every `--every` steps. A target is reached at the first measurement that is not above it.
5.  The run is the recipe's own, with its own length and schedule, in float32, in one process of one thread.
6.  A record is the median over three seeds, on one machine, in the same hour as the unit.
7.  A recipe that needs a new option of the product may have it, if the option has a name, a test and a document.
8.  No option may be about a single dataset by name, except through its card.
9.  A record stands in RESULTS.md with recipe, commit, machine, seconds, and the error at the end on the test split.
10. recipes/quickstart.yaml is the record holder.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.windows.loader import open_readers
from fm.checkpoint import load_pretrained
from fm.config import Recipe, load_recipe
from fm.evaluation.errors import ErrorFile
from fm.evaluation.measure import dataset_errors, measure_windows, one_step_windows
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.scores import score
from fm.training.trainer import train

HERE = Path(__file__).parent
UNIT = HERE / "speedrun_unit.yaml"


def one_step_error(run: Path, shards: Path, split: str) -> float:
    """Return the geometric mean over datasets of the one-step VRMSE over persistence's."""
    model = load_pretrained(run)
    protocol = replace(PROTOCOLS["thirds"].for_context(model.context), split=split)
    datasets = {}
    for name, reader in open_readers(shards, sorted(model.specs), split).items():
        errors = measure_windows(model, reader, one_step_windows(reader, protocol), torch.device("cpu"), batch_size=8)
        datasets[name] = dataset_errors(reader, (), protocol, [errors], ())
    return score(ErrorFile(protocol, datasets)).geometric_mean_ratio_to_persistence or math.inf


def measured(recipe: Recipe, folder: Path, every: int) -> Recipe:
    """Return the recipe with checkpoints at the measurements, and nothing else that takes time."""
    return replace(
        recipe,
        run=replace(recipe.run, dir=str(folder)),
        train=replace(recipe.train, precision="float32"),
        checkpoint=replace(recipe.checkpoint, every=every, keep=1),
        validation=replace(recipe.validation, every=0),
        tracking=replace(recipe.tracking, progress=False),
    )


def seconds_to(targets: Sequence[float], recipe: Recipe, every: int) -> tuple[list[float | None], float, float]:
    """Train the recipe. Return CPU seconds to each target, CPU seconds of the whole run, and the test split's error.

    A target that is not reached has None.
    """
    reached: list[float | None] = [None] * len(targets)
    used, shards = 0.0, Path(recipe.data.shards)
    for step in range(every, recipe.train.steps + every, every):
        stop = min(step, recipe.train.steps)
        began = time.process_time()
        train(replace(recipe, run=replace(recipe.run, stop_at=stop)))
        used += time.process_time() - began
        if None in reached:
            error = one_step_error(recipe.run.directory, shards, "valid")
            print(f"  step {stop}: {used:.0f} s, {error:.4f}", flush=True)
            reached = [
                used if old is None and error <= goal else old for old, goal in zip(reached, targets, strict=True)
            ]
    return reached, used, one_step_error(recipe.run.directory, shards, "test")


def main() -> None:
    """Run the recipes in turns, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path, default=[HERE.parents[1] / "recipes" / "quickstart.yaml"])
    parser.add_argument("--shards", default="data/mini/shards")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.36, 0.25])
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipes = list(dict.fromkeys([UNIT, *options.recipes]))
    found: dict[Path, list[list[float | None]]] = {recipe: [] for recipe in recipes}
    for seed in options.seeds:
        for file in recipes:
            print(f"{file.name}, seed {seed}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                recipe = load_recipe(file, [f"data.shards={options.shards}", f"run.seed={seed}"])
                recipe = measured(recipe, Path(folder) / "run", options.every)
                reached, used, error = seconds_to(options.targets, recipe, options.every)
                found[file].append([*reached, used, error])
    unit: float | None = None
    heads = [f"{target:g}" for target in options.targets]
    print(f"\n| recipe | {' | '.join(f'seconds to {head}' for head in heads)} | whole run | units | error on test |")
    print("|---" * (len(heads) + 4) + "|")
    for file, runs in found.items():
        columns = [[run[index] for run in runs] for index in range(len(heads) + 2)]
        medians = [None if None in column else statistics.median(column) for column in columns]  # type: ignore[type-var]
        unit = unit if unit is not None else medians[0]
        units = "-" if medians[0] is None or unit is None else f"{medians[0] / unit:.2f}"
        seconds = ["not reached" if value is None else f"{value:.0f}" for value in medians[:-1]]
        print(f"| {file.name} | {' | '.join(seconds)} | {units} | {medians[-1]:.4f} |")


if __name__ == "__main__":
    main()

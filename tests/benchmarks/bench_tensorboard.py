"""Measure the size of TensorBoard's files for a run of a million steps on eight datasets at their published grids.

    python tests/benchmarks/bench_tensorboard.py [--steps 20000] [--every 50] [--validate-every 5000]

Steps, validations and checkpoints go through the real RunRecord, with invented numbers. Pictures show random fields:
once with a falling spectrum, as in simulations, and once white noise, the worst case.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.registry import load_registry
from data_pipeline.windows.schedule import Schedule, Source
from fm.config import DataSettings, Recipe, RunSettings, TrackingSettings, TrainSettings, ValidationSettings
from fm.evaluation.evaluate import VALIDATION_STEPS_SHOWN, ValidationResult
from fm.evaluation.samples import Sample
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.record import RunRecord, StepResult
from fm.training.tensorboard import Dashboard

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from error_files import block_scores, dataset_scores, made_scores, window_scores
from handmade import STATE_CHANNELS, make_spec

GRIDS = {name: card.grid for name, card in load_registry(None).cards.items() if name in STATE_CHANNELS}
WINDOWS = ("1:20", "21:60")
MILLION = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=50, help="tracking.every (default 50)")
    parser.add_argument("--validate-every", type=int, default=5_000, help="validation.every, and saves (default 5000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = made_up_recipe(Path(folder) / "run", options.every, options.validate_every)
        scalars = bytes_of_steps(recipe, options.steps)
        occasion = {kind: bytes_of_pictures(Path(folder) / kind, kind) for kind in ("fields", "noise")}
    print(f"scalars and texts: {scalars / options.steps:.1f} kB per 1,000 steps")
    for kind, size in occasion.items():
        pictures = recipe.tracking.pictures * size
        total = scalars * MILLION / options.steps + pictures
        print(
            f"pictures of {kind}: {size / 1e6:.2f} MB an occasion, {recipe.tracking.pictures} occasions; "
            f"a million steps: {total / 1e6:.0f} MB, of which pictures {pictures / 1e6:.0f} MB"
        )


def made_up_recipe(directory: Path, every: int, validate_every: int) -> Recipe:
    return Recipe(
        run=RunSettings("bench", dir=str(directory)),
        data=DataSettings("none"),
        train=TrainSettings(MILLION),
        validation=ValidationSettings(every=validate_every),
        tracking=TrackingSettings(every=every, progress=False),
    )


def bytes_of_steps(recipe: Recipe, steps: int) -> int:
    """Return the bytes of the event files after so many steps, with saves and the scalars of validations."""
    model = WaveLiTFM(ModelConfig(width=16, depth=1, heads=2, wavelet="haar"), [make_spec(name) for name in GRIDS])
    schedule = Schedule([Source(name, 10_000, h * w // 4, (10_000,)) for name, (h, w) in GRIDS.items()], 4, seed=0)
    chance = np.random.default_rng(0)
    with RunRecord(recipe, schedule, model, 0, "one process") as record:
        for step in range(1, steps + 1):
            name = list(GRIDS)[step % len(GRIDS)]
            loss, norm = chance.random(2).tolist()
            grids = (GRIDS[name],)
            record.log_step(
                StepResult(step, (name,), grids, "", (loss,), loss, loss, norm, 1e-3, 4, (1,), 0.01, 0.15, 0.15, False)
            )
            if step % recipe.validation.every == 0:
                record.flush(step)
                record.log_validation(made_up_scores(), step)
    return sum(file.stat().st_size for file in (recipe.run.directory / "tensorboard").iterdir())


def made_up_scores() -> ValidationResult:
    """Return invented scores of the protocol `wavelit`."""
    datasets = {
        name: dataset_scores(
            block_scores(0.5, 0.5, STATE_CHANNELS[name].split()), {window: window_scores(0.5) for window in WINDOWS}
        )
        for name in GRIDS
    }
    return ValidationResult(made_scores(datasets, 0.5), {})


def bytes_of_pictures(directory: Path, kind: str) -> int:
    """Return the bytes of the event file after all datasets' pictures were written once."""
    board = Dashboard(directory, GRIDS, WINDOWS, 0)
    before = written(board, directory)
    for name, grid in GRIDS.items():
        truth, other = (random_fields(grid, kind, seed) for seed in (0, 1))
        steps, vrmse = tuple(range(1, VALIDATION_STEPS_SHOWN + 1)), np.full(VALIDATION_STEPS_SHOWN, 0.3)
        sample = Sample(name, "field", 0, 1.0, steps, truth, truth + 0.3 * other, vrmse)
        board.rollout(sample if kind == "fields" else replace(sample, prediction=other), 1)
    size = written(board, directory) - before
    board.close()
    return size


def written(board: Dashboard, directory: Path) -> int:
    board.flush(1)
    return sum(file.stat().st_size for file in directory.iterdir())


def random_fields(grid: tuple[int, int], kind: str, seed: int) -> np.ndarray:
    """Return Gaussian noise (n, H, W), white or with amplitudes proportional to the wavenumber to the power -2."""
    noise = np.random.default_rng(seed).standard_normal((VALIDATION_STEPS_SHOWN, *grid))
    if kind == "noise":
        return noise
    x, y = (np.fft.fftfreq(size) * size for size in grid)
    wavenumber = np.maximum(np.hypot(x[:, None], y), 1.0)
    fields = np.fft.ifft2(np.fft.fft2(noise) / wavenumber**2).real
    return fields / fields.std()


if __name__ == "__main__":
    main()

"""Write synthetic Well files, one per dataset at its published grid, and run every command on them.

    python tests/benchmarks/full_grids.py FOLDER [--frames 6] [--trajectories 2] [--splits train,valid] [--run]

Writes FOLDER/well/<dataset>/data/<split>/<dataset>.hdf5 with a few frames: fields, tensor orders, constant fields,
scalars and boundary groups are the card's, values are smooth waves. With --run it then audits, shards, inspects,
verifies and benchmarks them, into FOLDER/shards, and prints a line for each command.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from data_pipeline.registry import Card, load_registry
from data_pipeline.well.layout import edges
from data_pipeline.well.write import write_well_file


def waves(rng: np.random.Generator, shape: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
    """Return traveling waves that differ by trajectory and component; shape = (trajectories, frames) + components.

    float32: shape (b, T) gives (b, T, X, Y), shape (b, T, 2) gives (b, T, X, Y, 2), and so on.
    """
    x, y = (np.linspace(0, 2 * np.pi, size, endpoint=False, dtype=np.float32) for size in grid)
    out = np.empty((*shape[:2], *grid, *shape[2:]), np.float32)
    for component in np.ndindex(*shape[2:]):
        for trajectory in range(shape[0]):
            phase, (k, m) = rng.uniform(0, 6), rng.integers(1, 5, 2)
            for frame in range(shape[1]):
                wave = 1 + 0.5 * np.sin(k * x[:, None] + m * y + phase + 0.3 * frame)
                out[(trajectory, frame, ..., *component)] = wave + rng.normal(0, 0.01, grid)
    return out


def write_dataset(well: Path, card: Card, split: str, trajectories: int, frames: int) -> Path:
    """Write one file, named as the dataset, and return its path."""
    rng = np.random.default_rng([len(card.name), *card.name.encode(), *split.encode()])
    fields = {field.name: waves(rng, (trajectories, frames) + (2,) * field.order, card.grid) for field in card.state}
    constants = {field.name: waves(rng, (trajectories, 1), card.grid)[:, 0] for field in card.constant}
    x, y = (np.linspace(0, 1, size) for size in card.grid)
    axes = (np.arange(frames) * (card.dt or 1.0), x, y)
    path = well / card.name / "data" / split / f"{card.name}.hdf5"
    scalars = dict.fromkeys(card.scalars, 1.0)
    write_well_file(path, card.name, axes, fields, constants, scalars, edges(card.boundary, card.grid))
    return path


def run(*arguments: object) -> bool:
    """Run a command of data-pipeline, and print its time and its last line."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "data_pipeline", *map(str, arguments)], capture_output=True, text=True)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()] if done.returncode else done.stdout.splitlines()
    print(f"[{done.returncode}] {time.perf_counter() - start:6.1f} s  data-pipeline {shlex.join(map(str, arguments))}")
    print(f"               {lines[-1] if lines else ''}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--trajectories", type=int, default=2, help="of each split")
    parser.add_argument("--splits", default="train")
    parser.add_argument("--run", action="store_true", help="run the commands on them")
    options = parser.parse_args()
    cards, well, shards = load_registry().select(None), options.folder / "well", options.folder / "shards"
    for card in cards:
        for split in options.splits.split(","):
            path = write_dataset(well, card, split, options.trajectories, options.frames)
            print(f"{path}: {card.grid[0]}x{card.grid[1]}, {path.stat().st_size / 1e6:.1f} MB", flush=True)
    if not options.run:
        return 0
    shutil.rmtree(shards, ignore_errors=True)
    commands = [
        ("audit", well),
        ("shard", "--well", well, "--out", shards, "--dry-run"),
        ("shard", "--well", well, "--out", shards),
        ("inspect", shards),
        ("verify", shards),
        ("audit", shards),
        *(("bench", shards, "--well", well, "--datasets", name, "--seconds", 1) for name in cards),
    ]
    good = [run(*arguments) for arguments in commands]
    print(f"{sum(good)} of {len(good)} commands ended well")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

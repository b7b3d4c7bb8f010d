"""The command `data-pipeline import` in the current folder, and what it has written there."""

import shlex
from pathlib import Path

import h5py
import numpy as np
from foreign_files import POINTS, TIMES, N
from well_rules import broken_rules

from data_pipeline.cli import main
from data_pipeline.importer.convert import write_files
from data_pipeline.importer.options import Options
from data_pipeline.importer.plan import make_plan
from data_pipeline.well.dataset import whole_folder

PERIODIC = "--boundary x=periodic,y=wall"
STATED = f"--dims n,t,x,y {PERIODIC}"


def run(files: Path | str, options: str = "", name: str = "mine") -> int:
    return main(["import", str(files), "--name", name, "--out", "out", *shlex.split(options)])


def write(files: Path | str, options: str = "", name: str = "mine") -> str:
    """Write the files of a dataset without preview and card; return the plan's text."""
    typed: dict[str, list[str]] = {}
    for word in shlex.split(options):
        if word.startswith("--"):
            key = word[2:].replace("-", "_")
        else:
            typed.setdefault(key, []).append(word)
    many = {key: tuple(words) for key, words in typed.items() if key in ("map", "vector", "scalars")}
    one = {key: float(words[0]) if key == "dt" else words[0] for key, words in typed.items() if key not in many}
    plan = make_plan(Options((str(files),), name, Path("out"), **many, **one))  # type: ignore[arg-type]
    with whole_folder(Path("out"), name) as target:
        write_files(plan, target)
    return str(plan)


def imported(name: str = "mine") -> dict[str, np.ndarray]:
    """Fields (n, t, x, y, ...) in the order of the trajectories in the files: TRUTH's own values tell it."""
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted(Path("out", name, "data").glob("*/*.hdf5")):
        assert broken_rules(path) == []
        with h5py.File(path) as file:
            for group in ("t0_fields", "t1_fields"):
                for field, data in file[group].items():
                    found.setdefault(field, []).extend(data[()])
            assert all(file["dimensions"][axis][:].tolist() == np.float32(POINTS[axis]).tolist() for axis in "xy")
            np.testing.assert_allclose(np.atleast_2d(file["dimensions/time"])[0], TIMES, rtol=1e-6)
    return {field: np.stack(values) for field, values in found.items()}


def in_order(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Trajectories sorted as in `truth`; each is one of them bit for bit, in the same place of the grid."""
    places = [next(number for number in range(N) if np.array_equal(truth[number], one)) for one in values]
    assert sorted(places) == list(range(N))
    return values[np.argsort(places)]


VECTOR = f"{PERIODIC} --vector velocity=u,v"

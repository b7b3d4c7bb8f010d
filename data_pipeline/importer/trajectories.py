"""The trajectories of an import: where each lies in the files, its times, and its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.importer import options as said
from data_pipeline.importer.arrays import Array, open_source, reading
from data_pipeline.importer.axes import Side, find_side
from data_pipeline.importer.fields import Planned, plain_name
from data_pipeline.importer.layouts import Layout, recognize, run_arrays
from data_pipeline.importer.options import Options
from data_pipeline.well.dataset import check_times, seconds
from data_pipeline.well.hdf5 import SPLITS


@dataclass(frozen=True)
class StoredTrajectory:
    """One trajectory: its place in the files."""

    path: Path
    run: str  # prefix of the keys
    index: int | None  # along the axis n; None where there is none
    times: np.ndarray
    scalars: Mapping[str, float]
    numbers: Mapping[str, float]  # attributes of its file
    split: str | None  # of the file itself

    @property
    def label(self) -> str:
        """Return what messages call it."""
        run = f" {self.run.rstrip('/')}" if self.run else ""
        return f"{self.path}{run}{'' if self.index is None else f': trajectory {self.index}'}"


def find_trajectories(
    files: Sequence[Path], options: Options, fields: Sequence[Planned], sides: Mapping[str, Side], pattern: str | None
) -> list[StoredTrajectory]:
    """Return the trajectories of all files, in order. UserError for files whose arrays differ in grid or names."""
    trajectories = []
    for path in files:
        with open_source(path) as source, reading(path):
            layout = recognize(source, pattern)
            for run in layout.runs:
                trajectories += _of_run(path, run, layout, run_arrays(source, run), options, fields, sides, files[0])
    return trajectories


def _of_run(
    path: Path,
    run: str,
    layout: Layout,
    arrays: Mapping[str, Array],
    options: Options,
    fields: Sequence[Planned],
    sides: Mapping[str, Side],
    first: Path,
) -> list[StoredTrajectory]:
    where = f"{path}{f' {run}' if run else ''}"
    sizes: dict[str, int] = {}
    for part in (part for one in fields for part in one.parts):
        if part.key not in arrays or len(arrays[part.key].shape) != len(part.dims):
            raise UserError(f"{where}: expected the array {part.key} as in {first}, got {', '.join(arrays)}")
        for axis, size, number in zip(part.dims, arrays[part.key].shape, part.fixed, strict=True):
            if number is None and sizes.setdefault(axis, size) != size:
                raise UserError(f"{where}: {part}: expected {sizes[axis]} points along {axis}, as before, got {size}")
    for axis, side in sides.items():
        if sizes[axis] != side.stored:
            raise UserError(
                f"{where}: expected {side.stored} points along {axis} as in {first}, got {sizes[axis]}; a "
                "dataset has one grid, so import the others under another --name"
            )
        own = find_side(axis, sizes[axis], options, layout, arrays, {}, where)
        if not np.allclose(own.points, side.points, rtol=1e-5, atol=1e-5 * float(np.ptp(side.points))):
            raise UserError(f"{where}: its points along {axis} differ from those of {first} ({own.origin})")
    count, frames = sizes.get("n", 1), min(sizes["t"], layout.num_frames or sizes["t"])
    split = layout.splits.get(run) or (path.absolute().parent.name if path.absolute().parent.name in SPLITS else None)
    scalars = _run_scalars(where, layout, arrays, options, count)
    trajectories = []
    for index in range(count):
        times = _times(where, layout, arrays, options, count, index, frames)
        parameters = {name: float(values[index]) for name, values in scalars.items()}
        trajectories.append(
            StoredTrajectory(path, run, index if "n" in sizes else None, times, parameters, layout.numbers, split)
        )
        check_times(times, trajectories[-1].label)
    return trajectories


def _times(
    where: str, layout: Layout, arrays: Mapping[str, Array], options: Options, count: int, index: int, frames: int
) -> np.ndarray:
    if options.dt is not None:
        return np.arange(frames) * options.dt
    key = layout.coordinates.get("t", "")
    if key in arrays:
        times = seconds(arrays[key].whole())
        times = times[index] if times.ndim == 2 and len(times) == count else times
        extra = 1 if layout.num_frames is None else len(times)  # PDEBench's CFD files have a time more than frames
        if times.ndim != 1 or not frames <= len(times) <= frames + extra:
            raise UserError(f"{where}: {key}: expected {frames} times, got {arrays[key].shape}; state --dt instead")
        return times[:frames]
    dt = arrays["dt"].whole().reshape(-1) if "dt" in arrays else np.array([layout.numbers.get("dt", np.nan)])
    return np.arange(frames) * float(dt[index if len(dt) == count else 0])


def _run_scalars(
    where: str, layout: Layout, arrays: Mapping[str, Array], options: Options, count: int
) -> dict[str, np.ndarray]:
    """Return the parameters that arrays hold, one number for each trajectory, and those that the user names."""
    wanted = {key: key.rpartition("/")[2] for key, axes in layout.dims.items() if axes == ("n",)}
    for text in options.scalars:
        if text != "attrs":
            wanted |= said.pairs(text, "--scalars", "attrs, or KEY=NAME")
    made = {}
    for key, name in wanted.items():
        if key not in arrays and key not in layout.numbers:
            raise UserError(f"{where}: --scalars {key}: expected {', '.join([*arrays, *layout.numbers])}")
        values = arrays[key].whole() if key in arrays else np.array([layout.numbers[key]])
        if values.size not in (1, count) or values.dtype.kind not in "iufb":
            raise UserError(f"{where}: --scalars {key}: expected one number, or one for each of {count} trajectories")
        made[plain_name(name)] = np.broadcast_to(values.reshape(-1).astype(np.float64), (count,))
    return made


def leave_out(trajectories: list[StoredTrajectory], options: Options) -> list[StoredTrajectory]:
    """Return the trajectories that --leave-out does not name. UserError if none remains."""
    left_out = said.numbers(options.leave_out, "--leave-out")
    if unknown := [number for number in left_out if number >= len(trajectories)]:
        raise UserError(f"--leave-out {unknown[0]}: expected numbers of the {len(trajectories)} trajectories, from 0")
    if len(set(left_out)) == len(trajectories):
        raise UserError("--leave-out: expected at least one trajectory to remain, got none")
    return [trajectory for number, trajectory in enumerate(trajectories) if number not in left_out]


def choose_scalars(trajectories: list[StoredTrajectory], options: Options, notes: list[str]) -> list[StoredTrajectory]:
    """Add the attributes that are parameters: those that differ from run to run, or all with `--scalars attrs`."""
    shared = set.intersection(*(set(trajectory.numbers) for trajectory in trajectories)) - {"dt"}
    differing = {name for name in shared if len({trajectory.numbers[name] for trajectory in trajectories}) > 1}
    named = {key for text in options.scalars if text != "attrs" for key in said.pairs(text, "--scalars", "")}
    chosen = (shared if "attrs" in options.scalars else differing) - named
    for name in sorted(shared - chosen - named):
        notes.append(
            f"attribute {name} = {trajectories[0].numbers[name]:g}: --scalars {name}={name} makes it a parameter"
        )
    extra = [(name, plain_name(name)) for name in sorted(chosen)]
    return [
        replace(trajectory, scalars={**trajectory.scalars, **{plain: trajectory.numbers[key] for key, plain in extra}})
        for trajectory in trajectories
    ]

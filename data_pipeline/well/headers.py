"""What the headers of a dataset's files show before it is used: missing splits, grids, time steps, other readers.

`check_headers` is called by `data-pipeline check`, `register` (so by `import`) and `shard`. Findings about single times
and axes are made by WellFile, those about values by the audit.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py

from data_pipeline.errors import UserError
from data_pipeline.registry import Card
from data_pipeline.well.findings import Finding, StoredFrames, copies
from data_pipeline.well.hdf5 import SPLITS, WellFile, block_frames
from data_pipeline.well.layout import File, attribute, hdf5_errors, plain_dataset, plain_group, texts

MODEL_GRID = 16  # points along an axis that the models need at least; an even number, which the transform halves
_SAME_STEP = 1e-3  # relative difference that rounding of float32 times may leave
_WITHOUT = {  # what cannot be done without a split
    "train": ("error", "there is nothing to train on"),
    "valid": ("warning", "a run cannot be validated; train with validation.every=0"),
    "test": ("warning", "`fm evaluate` has nothing to score; give it --split valid"),
}
_FILE_ATTRIBUTES = ("dataset_name", "grid_type", "n_spatial_dims", "n_trajectories")  # that WellDataset reads
Place = tuple[str, Finding]  # split, and what was found there


def check_headers(card: Card, files: Mapping[str, Sequence[File]], *, any_step: bool = False) -> list[Place]:
    """Return what the headers of a dataset's files, by split, show.

    `any_step`: the time step may differ from trajectory to trajectory.
    """
    found = [
        (split, Finding("splits", severity, "", None, None, (), f"no files in data/{split}: {why}"))
        for split, (severity, why) in _WITHOUT.items()
        if not files.get(split)
    ]
    grids: dict[tuple[int, int], str] = {}  # those that no model takes, with the first split that has them
    steps: dict[float, str] = {}
    for split in SPLITS:
        names: dict[str, str] = {}  # dataset_name -> the first file that has it
        for path in files.get(split, ()):
            try:
                with WellFile(path, card) as file:
                    if any(size % 2 or size < MODEL_GRID for size in file.grid):
                        grids.setdefault(file.grid, split)
                    for trajectory in range(file.num_trajectories if file.num_frames > 1 else 0):
                        step = file.dt(trajectory)
                        if step and not any(abs(step - known) <= _SAME_STEP * known for known in steps):
                            steps[step] = split
                found += [(split, _reader(path.name, fault)) for fault in reader_faults(path, names)]
            except UserError as error:
                detail = " ".join(str(error).split())
                found.append((split, Finding("unreadable", "error", path.name, None, None, (), detail)))
    for grid, split in grids.items():
        odd = "; `data-pipeline import --crop even` leaves out the last point" if any(n % 2 for n in grid) else ""
        detail = (
            f"{grid[0]} x {grid[1]} points: the models need even numbers of at least {MODEL_GRID} along x and y{odd}"
        )
        found.append((split, Finding("model_grid", "error", "", None, None, (), detail)))
    if len(steps) > 1 and not any_step:
        span = f"from {min(steps):.6g} to {max(steps):.6g}"
        detail = f"the time step differs, {span} (dt: null in the card): are the times right?"
        found.append((list(steps.values())[-1], Finding("times", "warning", "", None, None, (), detail)))
    return found


def _reader(file: str, fault: str) -> Finding:
    return Finding("reader", "warning", file, None, None, (), f"the_well's WellDataset cannot read it: {fault}")


def reader_faults(path: File, names: dict[str, str]) -> list[str]:
    """Return why the_well's WellDataset (1.2) would not open a file that WellFile has opened, or not beside the others.

    `names` are the dataset_name of the files before it in its split, each with a file; this file's is added. UserError
    for links.
    """
    if not isinstance(path, Path):
        return []
    found = []
    with hdf5_errors(str(path)), h5py.File(path, "r") as file:
        missing = [f"attribute {name}" for name in _FILE_ATTRIBUTES if name not in file.attrs]
        for group, listing, flags in (
            ("dimensions", "spatial_dims", ("sample_varying",)),
            ("scalars", "field_names", ("sample_varying", "time_varying")),
        ):
            where = f"{path}: {group}"
            owner = plain_group(file, group, where)
            for name in [*texts(attribute(owner, listing)), *(["time"] if group == "dimensions" else [])]:
                attrs = plain_dataset(owner, name, f"{where}/{name}").attrs
                missing += [f"{group}/{name}: attribute {flag}" for flag in flags if flag not in attrs]
        if missing:
            found.append(f"it has no {', no '.join(missing[:4])}")
        if file["dimensions/time"].shape[-1] < 2:
            found.append("it has a single frame, and two are read at a time")
        if "dataset_name" in file.attrs:
            name = texts(file.attrs["dataset_name"])[0]
            names.setdefault(name, path.name)
            if len(names) > 1 and names[name] == path.name:
                other, first = next(iter(names.items()))
                found.append(f"its dataset_name is {name}, and {first} has {other}")
    return found


def sampled_copies(card: Card, files: Mapping[str, Sequence[File]]) -> list[Place]:
    """Return the trajectories that are byte-identical with another one. Those whose ends are equal are read whole."""
    ends: dict[int, list[tuple[str, File, int]]] = {}
    for split in SPLITS:
        for path in files.get(split, ()):
            with WellFile(path, card) as file:
                for index in range(file.num_trajectories):
                    last = file.num_frames - 1
                    first_and_last = file.read(index, 0, 1).tobytes() + file.read(index, last, last + 1).tobytes()
                    ends.setdefault(zlib.crc32(first_and_last), []).append((split, path, index))
    return [one for alike in ends.values() if len(alike) > 1 for one in copies([_stored(card, *key) for key in alike])]


def _stored(card: Card, split: str, path: File, index: int) -> StoredFrames:
    crcs = []
    with WellFile(path, card) as file:
        step = block_frames(4 * len(card.state_channels) * file.grid[0] * file.grid[1])
        for start in range(0, file.num_frames, step):
            frames = file.read(index, start, min(start + step, file.num_frames))
            crcs += [f"{zlib.crc32(frame.tobytes()):08x}" for frame in frames]
    return StoredFrames(split, path.name, index, "".join(crcs))


def usable(findings: Sequence[Finding]) -> str:
    """Return in one sentence whether data with these findings can be used as they are."""
    errors, warnings = (sum(one.severity == severity for one in findings) for severity in ("error", "warning"))
    if errors:
        return f"It cannot be used as it is: {errors} error{'s' * (errors > 1)}."
    return "It can be used; read the warnings first." if warnings else "It can be used as it is."

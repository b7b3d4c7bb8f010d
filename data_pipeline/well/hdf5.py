"""Read trajectories from the Well's HDF5 files, channel first, every field found by its name.

A file holds trajectories of one parameter set. `the_well` takes the channel order of the first file for all files. Here
each file's fields are put into the order of the dataset's card, so files may list their fields in different orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.registry import Card, Field, Registry
from data_pipeline.remote import RemoteFolder
from data_pipeline.well.findings import Finding, Spacing, axis_finding, even_step, mean_spacing, times_finding
from data_pipeline.well.layout import (
    BoundaryMask,
    File,
    Folder,
    attribute,
    boundary_masks,
    boundary_types,
    check_extent,
    child_file,
    child_names,
    flags,
    hdf5_errors,
    plain_dataset,
    plain_group,
    texts,
)

SPLITS = ("train", "valid", "test")
SUFFIXES = (".h5", ".hdf5")
MAX_FRAME_BYTES = 2**30  # of all state fields; the largest published frame has 10 MB
CF_ATTRIBUTES = ("units", "calendar", "long_name", "standard_name", "axis", "positive")  # of times and axes
_BLOCK_BYTES = 4 * 2**20  # of frames that are worked on at a time: what fits a core's cache
_CHUNK_CACHE_BYTES = 32 * 2**20  # repacked Well files have chunks of several MiB: read each only once


def chosen_splits(names: Sequence[str] | None) -> list[str]:
    """Return the named splits in the order of SPLITS; None means all. UserError for another name."""
    for name in names or ():
        if name not in SPLITS:
            raise UserError(f"split {name!r}: expected {', '.join(SPLITS)}")
    return [split for split in SPLITS if names is None or split in names]


def dataset_folders(well: Folder, names: Sequence[str] | None = None) -> dict[str, Folder]:
    """Return dataset name -> folder, for each `<well>/<name>/data` and `<well>/datasets/<name>/data`, sorted by name.

    With `names`, only these are looked for. That also works on servers that list the folders of datasets alone.
    """
    if isinstance(well, RemoteFolder) and names is None:
        parent = well / "datasets" if "datasets" in well.names() else well
        return {name: parent / name for name in parent.names() if "." not in name}
    folders: dict[str, Folder] = {}
    for base in (well, well / "datasets"):
        for name in child_names(base) if names is None else names:
            if name not in folders and _holds_data(base / name):
                folders[name] = base / name
    return dict(sorted(folders.items()))


def _holds_data(folder: Folder) -> bool:
    if isinstance(folder, Path):
        return (folder / "data").is_dir()
    try:
        return "data" in folder.names()
    except UserError:  # not there, as far as this server tells
        return False


def split_files(folder: Folder, split: str) -> list[File]:
    """Return the HDF5 files of one split of a dataset folder, sorted by path as the_well sorts them; may be empty."""
    if isinstance(folder, RemoteFolder) and split not in child_names(folder / "data"):
        return []
    directory = folder / "data" / split
    return [child_file(directory, name) for name in divide_names(child_names(directory))[0]]


def divide_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of HDF5 files that are read, and those left out. Hidden ones (`._a.hdf5`) are neither."""
    shown = [name for name in names if not name.startswith(".")]
    return [name for name in shown if name.endswith(SUFFIXES)], [name for name in shown if not name.endswith(SUFFIXES)]


def left_out_names(folder: Folder, split: str | None) -> list[str]:
    """Return the names in a split of a dataset's folder that are not read; None: those in `data` beside the splits."""
    beside = [name for name in child_names(folder / "data") if name not in SPLITS and not name.startswith(".")]
    if split is None:
        return [f"data/{name}" for name in beside]
    there = split in child_names(folder / "data")
    return divide_names(child_names(folder / "data" / split))[1] if there else []


def block_frames(frame_bytes: int) -> int:
    """Return how many frames to read at a time: a few MiB, so memory does not grow with trajectories or chunks."""
    return max(1, _BLOCK_BYTES // frame_bytes)


@dataclass(frozen=True)
class _Stored:
    """One field as it lies in the file, and where its components go in the output."""

    field: Field
    data: h5py.Dataset
    channel: int
    sample_varying: bool
    dim_varying: tuple[bool, bool]


class WellFile:
    """One open HDF5 file of the Well, checked against the dataset's card. Use it as a context manager.

    Raises UserError when the file is truncated or no HDF5, when its fields, their shapes or types are not the card's,
    and when a read fails.
    """

    def __init__(self, path: File, card: Card) -> None:
        self.path, self.card = path, card
        self._scratch = np.empty(0, np.float32)
        with ExitStack() as opened, hdf5_errors(self._where):
            source = path if isinstance(path, Path) else opened.enter_context(path.open())
            self._file = opened.enter_context(h5py.File(source, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES))
            self._read_header()
            self._opened = opened.pop_all()

    def _read_header(self) -> None:
        dimensions = self._group("dimensions")
        axes = texts(attribute(dimensions, "spatial_dims"))
        if axes != ["x", "y"]:
            raise UserError(f"{self._where}: expected the spatial axes x, y, got {', '.join(axes)}")
        self.num_trajectories = int(attribute(self._file, "n_trajectories"))
        self.num_frames, size_x, size_y = (int(self._points(name).shape[-1]) for name in ("time", *axes))
        self.grid = (size_x, size_y)
        if self.num_trajectories < 1 or self.num_frames < 1 or min(self.grid) < 1:
            raise UserError(
                f"{self._where}: no trajectory in it ({self.num_trajectories} trajectories of {self.num_frames} "
                f"frames on {self.grid[0]}x{self.grid[1]}); remove the file or get it again"
            )
        frame_bytes = 4 * len(self.card.state_channels) * math.prod(self.grid)
        if frame_bytes > MAX_FRAME_BYTES:
            raise UserError(
                f"{self._where}: expected frames of at most {MAX_FRAME_BYTES} bytes, got {frame_bytes} "
                f"({self.grid[0]}x{self.grid[1]}, {len(self.card.state_channels)} channels); cut the grid into parts"
            )
        self.boundary = boundary_types(self.boundary_masks())
        self._state, self._constant = self._find_fields()
        if self.num_trajectories > 1 and not any(stored.sample_varying for stored in self._state):
            raise UserError(
                f"{self._where}: it states {self.num_trajectories} trajectories and holds one: no state field is "
                "stored per trajectory (sample_varying); get the file again"
            )

    def _find_fields(self) -> tuple[list[_Stored], list[_Stored]]:
        """Return the card's state and constant fields as they lie in this file, in the card's order."""
        found: dict[str, dict[str, int]] = {"state": {}, "constant": {}}
        for order in range(3):
            for name in texts(attribute(self._group(f"t{order}_fields"), "field_names")):
                (time_varying,) = flags(self._dataset(f"t{order}_fields", name), "time_varying")
                found["state" if time_varying else "constant"][name] = order
        self.card.check_fields(found["state"], found["constant"], self._where)
        stored: dict[str, list[_Stored]] = {"state": [], "constant": []}
        for field in self.card.fields:
            before = sum(len(one.field.channels) for one in stored[field.role])
            stored[field.role].append(self._find_field(field, before))
        return stored["state"], stored["constant"]

    def _find_field(self, field: Field, channel: int) -> _Stored:
        data = self._dataset(f"t{field.order}_fields", field.name)
        (sample_varying,), (in_x, in_y) = flags(data, "sample_varying"), flags(data, "dim_varying", 2)
        shape = (self.num_trajectories,) * sample_varying + (self.num_frames,) * (field.role == "state")
        shape += (self.grid[0],) * in_x + (self.grid[1],) * in_y + (2,) * field.order
        where = f"{self._where}: field {field.name}"
        if data.shape != shape:
            raise UserError(f"{where}: expected the shape {shape} from the file's dimensions, got {data.shape}")
        if data.dtype.kind != "f" or data.dtype.itemsize != 4:
            raise UserError(
                f"{where}: expected float32, as the shards hold it, got {data.dtype}; convert the file first"
            )
        return _Stored(field, data, channel, sample_varying, (in_x, in_y))

    def read(self, trajectory: int, first: int, stop: int) -> np.ndarray:
        """Return frames [first, stop) of one trajectory: float32 (T, C, H, W), channels in the card's state order."""
        out = np.empty((stop - first, len(self.card.state_channels), *self.grid), np.float32)
        for stored in self._state:
            index = (trajectory,) * stored.sample_varying + (slice(first, stop),)
            self._copy(stored, index, out)
        return out

    def constants(self, trajectory: int) -> np.ndarray:
        """Return the constant fields of one trajectory: float32 (K, H, W), in the card's order; K may be 0."""
        out = np.empty((1, len(self.card.constant_channels), *self.grid), np.float32)
        for stored in self._constant:
            self._copy(stored, (trajectory,) * stored.sample_varying, out)
        return out[0]

    def _copy(self, stored: _Stored, index: tuple[int | slice, ...], out: np.ndarray) -> None:
        """Read part of a field into its channels of out (T, C, H, W), without a copy in between where possible."""
        num_channels = len(stored.field.channels)
        channels = slice(stored.channel, stored.channel + num_channels)
        sides = [size if varying else 1 for size, varying in zip(self.grid, stored.dim_varying, strict=True)]
        with hdf5_errors(self._where):
            if num_channels == 1 and stored.field.role == "state" and all(stored.dim_varying):
                stored.data.read_direct(out, index, np.s_[:, stored.channel])
                return
            size = len(out) * math.prod(sides) * num_channels
            if self._scratch.size < size:
                self._scratch = np.empty(size, np.float32)
            shape = stored.data.shape[len(index) :]
            block = self._scratch[:size].reshape(((len(out),) if stored.field.role == "state" else ()) + shape)
            stored.data.read_direct(block, index or None)
        block = block.reshape(len(out), *sides, num_channels)  # (T, H, W, components), xx xy yx yy
        out[:, channels] = np.moveaxis(block, -1, 1)

    def check_finite(self, values: np.ndarray, trajectory: int, first: int | None, remedy: str = "") -> None:
        """Raise UserError, naming field and frame, if `values` holds NaN or Inf; `remedy` ends its message.

        values: (T, C, H, W) from frame `first` on, or constants (K, H, W) with `first` None.
        """
        if np.isfinite(values).all():
            return
        bad = ~np.isfinite(values if first is not None else values[None]).all(axis=(2, 3))  # (T, C)
        time_index, channel = (int(axis[0]) for axis in np.nonzero(bad))
        name = (self.card.constant_channels if first is None else self.card.state_channels)[channel]
        field = next(field for field in self.card.fields if name in field.channels)
        frame = "" if first is None else f", frame {first + time_index}"
        raise UserError(
            f"{self._where}: trajectory {trajectory}, field {field.name} ({name}){frame}: "
            f"expected finite numbers, got NaN or Inf; get this file again, or leave it out{remedy}"
        )

    def times(self, trajectory: int) -> np.ndarray:
        """Return the physical times of the stored frames of one trajectory, float64 (T,)."""
        return self._dimensions["time"][trajectory]

    def dt(self, trajectory: int) -> float | None:
        """Return the time between stored frames of one trajectory; None if it differs, 0 if there is a single frame."""
        times = self.times(trajectory)
        if not np.isfinite(times).all():
            raise UserError(f"{self._where}: trajectory {trajectory}: times are not finite; write them anew")
        step = even_step(times) if len(times) > 1 else 0.0
        return step if step is not None and step >= 0 else None

    def axes(self, trajectory: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the points along x and y, float64 (X,) and (Y,)."""
        return self._dimensions["x"][trajectory], self._dimensions["y"][trajectory]

    @property
    def spacing(self) -> Spacing | None:
        """The spacing of the grid, as far as it has one."""
        return mean_spacing(*self.axes())

    def axis_attributes(self) -> dict[str, dict[str, Any]]:
        """Return time, x, y -> attributes that say what their numbers mean, as the units and calendars of CF."""
        with hdf5_errors(self._where):
            stored = {name: self._points(name).attrs for name in ("time", "x", "y")}
            return {
                name: {key: texts(one[key])[0] for key in CF_ATTRIBUTES if key in one} for name, one in stored.items()
            }

    def findings(self) -> list[Finding]:
        """Return what is wrong with the times of each trajectory and with the axes."""
        name, count = self.path.name, self.num_trajectories
        found = [times_finding(self.times(one), name, one) for one in range(count)]
        for axis in "xy":
            points = self._dimensions[axis]
            found.append(axis_finding(axis, points[0], name))
            if not np.allclose(points, points[:1], equal_nan=True):
                detail = f"points along {axis} differ between trajectories; the first's are taken for all"
                found.append(Finding("axes", "warning", name, None, None, (), detail))
        return [one for one in found if one is not None]

    @cached_property
    def _dimensions(self) -> dict[str, np.ndarray]:
        """The points of time, x and y of each trajectory, float64 (n, points)."""
        with hdf5_errors(self._where):
            stored = {name: np.asarray(self._points(name)[()], np.float64) for name in ("time", "x", "y")}
        count = self.num_trajectories
        return {name: np.broadcast_to(points, (count, points.shape[-1])) for name, points in stored.items()}

    def _points(self, name: str) -> h5py.Dataset:
        """Return a dataset of `dimensions`. UserError unless it is (points,), or (trajectories, points)."""
        data = self._dataset("dimensions", name)
        moving = name != "time" and "time_varying" in data.attrs and flags(data, "time_varying")[0]
        by_sample = "sample_varying" not in data.attrs or flags(data, "sample_varying")[0]
        rows = data.ndim == 2 and data.shape[0] == self.num_trajectories and by_sample
        if moving or not (data.ndim == 1 or rows):
            raise UserError(
                f"{self._where}: dimensions/{name}: expected the shape (points,) or ({self.num_trajectories}, points), "
                f"got {data.shape}{' that varies in time' if moving else ''}; interpolate curved or moving grids first"
            )
        return data

    def boundary_masks(self) -> tuple[BoundaryMask, ...]:
        """Return the boundary conditions as the file stores them."""
        with hdf5_errors(self._where):
            return boundary_masks(self._group("boundary_conditions"), self._where)

    def scalars(self, trajectory: int) -> dict[str, float]:
        """Return the constant scalars of one trajectory, by the Well's names. UserError if one varies in time."""
        scalars = {}
        with hdf5_errors(self._where):
            for name in texts(attribute(self._group("scalars"), "field_names")):
                data = self._dataset("scalars", name)
                if flags(data, "time_varying")[0]:
                    raise UserError(f"{self._where}: scalar {name} varies in time; only constant scalars are supported")
                scalars[name] = float(data[trajectory] if flags(data, "sample_varying")[0] else data[()])
        if not np.isfinite(list(scalars.values())).all():
            raise UserError(f"{self._where}: trajectory {trajectory}: a scalar is not finite: {scalars}; write it anew")
        return scalars

    def _group(self, name: str) -> h5py.Group:
        return plain_group(self._file, name, f"{self._where}: {name}")

    def _dataset(self, group: str, name: str) -> h5py.Dataset:
        data = plain_dataset(self._group(group), name, f"{self._where}: {group}/{name}")
        check_extent(data, f"{self._where}: {group}/{name}")
        return data

    @property
    def _where(self) -> str:
        return f"{self.path} (dataset {self.card.name})"

    def __enter__(self) -> WellFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()


@dataclass(frozen=True)
class Setting:
    """All that n trajectories on X x Y points share with predictions of them: everything but the states."""

    card: Card
    x: np.ndarray  # (X,)
    y: np.ndarray  # (Y,)
    constants: np.ndarray  # (n, K, X, Y) float32, in the card's order
    scalars: Mapping[str, np.ndarray]  # name -> (n,)
    boundaries: tuple[BoundaryMask, ...]
    attributes: Mapping[str, Mapping[str, Any]] = dataclass_field(default_factory=dict)  # of time, x, y

    @property
    def num_trajectories(self) -> int:
        """Return the number of trajectories n."""
        return len(self.constants)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of grid points (X, Y)."""
        return len(self.x), len(self.y)


def read_setting(file: WellFile, trajectories: Sequence[int]) -> Setting:
    """Return the setting of some trajectories of a file, in their order."""
    x, y = file.axes(trajectories[0])
    scalars = [file.scalars(trajectory) for trajectory in trajectories]
    return Setting(
        card=file.card,
        x=x,
        y=y,
        constants=np.stack([file.constants(trajectory) for trajectory in trajectories]),
        scalars={name: np.array([one[name] for one in scalars]) for name in scalars[0]},
        boundaries=file.boundary_masks(),
        attributes=file.axis_attributes(),
    )


def read_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of an HDF5 file, `dataset_name` among them. UserError if there is no such file."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "none"
        raise UserError(f"{path}: expected an HDF5 file in the Well's layout, found {found}")
    with hdf5_errors(str(path)), h5py.File(path, "r") as file:
        return dict(file.attrs)


def stored_card(path: Path, registry: Registry, dataset: str | None, attributes: Mapping[str, Any]) -> Card:
    """Return the card of `dataset`, by default of the attribute `dataset_name`. UserError if there is none."""
    name = dataset or attributes.get("dataset_name")
    if name is None:
        raise UserError(
            f"{path}: it does not say which dataset it is of: write its name to the attribute dataset_name, or start "
            "a rollout from it with `fm rollout --dataset NAME`"
        )
    return registry.card(texts(name)[0])

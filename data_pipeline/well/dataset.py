"""A dataset in the Well's layout from arrays: `write_well`, and `write_dataset` for data that come frame by frame.

Files are <folder>/<name>/data/{train,valid,test}/<name>.hdf5. Trajectories of another length have a file of their own.

Array legend: N trajectories, T frames, C state channels, K constant channels, X Y grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import UserError, atomic_path, free_bytes
from data_pipeline.hashing import nested_choice
from data_pipeline.registry import BOUNDARY_TYPES, Boundary, Card, Field
from data_pipeline.schema import NAME
from data_pipeline.well.hdf5 import MAX_FRAME_BYTES, SPLITS, Setting
from data_pipeline.well.layout import edges
from data_pipeline.well.survey import COMPONENTS
from data_pipeline.well.write import WellWriter

FRACTIONS = (0.8, 0.1, 0.1)  # of the trajectories, for train, valid and test
AXIS_NAMES = {  # axis -> what files call it, in lower case
    "n": ("n", "sample", "samples", "trajectory", "trajectories", "traj", "batch", "run", "member", "ensemble", "seed"),
    "t": ("t", "time", "times", "t-coordinate", "t_coordinate"),
    "c": ("c", "channel", "channels", "component", "components", "variable"),
    "x": ("x", "x-coordinate", "x_coordinate"),
    "y": ("y", "y-coordinate", "y_coordinate"),
    "z": ("z", "z-coordinate", "z_coordinate"),
}
_SAME_STEP = 1e-3  # relative difference that rounding of float32 times may leave


def axis_of(name: str) -> str | None:
    """Return the axis n, t, c, x, y or z that a file means by `name`, or None."""
    return next((axis for axis, names in AXIS_NAMES.items() if name.lower() in names), None)


@dataclass(frozen=True)
class Trajectories:
    """What is to be written, with the states read one frame at a time."""

    fields: tuple[Field, ...]  # state, then constant; each in the order t0, t1, t2
    times: Sequence[np.ndarray]  # (T,) of each trajectory
    x: np.ndarray  # (X,)
    y: np.ndarray  # (Y,)
    boundary: Boundary
    frames: Callable[[int], Iterator[np.ndarray]]  # trajectory -> its frames (C, X, Y), real numbers
    constants: Callable[[int], np.ndarray]  # trajectory -> (K, X, Y)
    scalars: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,)
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # field -> units, long_name
    labels: Sequence[str] = ()  # of the trajectories, for messages

    def __post_init__(self) -> None:
        _check_names([one.name for one in self.fields], "field")
        _check_names(list(self.scalars), "scalar")
        if not self.times:
            raise UserError("expected at least one trajectory, got none")
        for axis, points in (("x", self.x), ("y", self.y)):
            check_points(points, axis)
        frame_bytes = 4 * len(self.channels("state")) * len(self.x) * len(self.y)
        if frame_bytes > MAX_FRAME_BYTES:
            raise UserError(f"expected frames of at most {MAX_FRAME_BYTES} bytes, got {frame_bytes}; cut the grid")
        for index, times in enumerate(self.times):
            check_times(times, self.label(index))
        for name, values in self.scalars.items():
            if values.shape != (len(self.times),) or not np.isfinite(values).all():
                raise UserError(f"scalar {name}: expected {len(self.times)} finite numbers, got {values}")

    def channels(self, role: str) -> list[str]:
        """Return the names of the channels of the state or of the constant fields."""
        return [channel for one in self.fields if one.role == role for channel in one.channels]

    def label(self, index: int) -> str:
        """Return what messages call a trajectory."""
        return self.labels[index] if self.labels else f"trajectory {index}"


def make_field(name: str, order: int, role: str = "state") -> Field:
    """Return a field whose channels have the names of its components."""
    return Field(name, order, role, tuple(name + component for component in COMPONENTS[order]))


def _check_names(names: Sequence[str], what: str) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"{what} {name[:80]!a}: expected up to 64 letters, digits and underscores, a letter first; rename it"
            )
    if len(set(names)) < len(names):
        raise UserError(f"{what}s {', '.join(names)}: expected each name once; rename one")


def check_points(points: np.ndarray, axis: str) -> None:
    """Raise UserError unless grid points increase."""
    if points.ndim != 1 or len(points) < 2 or not np.isfinite(points).all() or not (np.diff(points) > 0).all():
        raise UserError(f"{axis}: expected at least 2 points that increase, got {_brief(points)}")


def check_times(times: np.ndarray, where: str) -> None:
    """Raise UserError unless the times of a trajectory are evenly spaced."""
    if len(times) < 2:
        raise UserError(
            f"{where}: expected at least 2 frames, got {len(times)}; a model learns the step to the next one"
        )
    steps = np.diff(times)
    rounding = 4 * float(np.finfo(np.float32).eps) * float(np.abs(times).max())
    if not np.isfinite(times).all() or not (steps > 0).all():
        raise UserError(f"{where}: expected times that increase, got {_brief(times)}")
    if np.ptp(steps) > _SAME_STEP * steps.mean() + rounding:
        raise UserError(
            f"{where}: expected evenly spaced times, got steps from {steps.min():.6g} to {steps.max():.6g}; the model "
            "takes equal steps. Interpolate the frames to equal steps, or state one time step for all of them"
        )


def _brief(values: np.ndarray) -> str:
    return f"{values.shape} {np.array2string(values.reshape(-1)[:6], precision=4)}"


def seconds(times: np.ndarray) -> np.ndarray:
    """Return times as float64; dates and durations of numpy become seconds, dates since the first one."""
    if times.dtype.kind == "M":
        times = times - times.reshape(-1)[:1]
    return times / np.timedelta64(1, "s") if times.dtype.kind == "m" else np.asarray(times, np.float64)


def parse_boundary(given: Mapping[str, str | Sequence[str]]) -> Boundary:
    """Return the boundary of {"x": "periodic", "y": ("wall", "open")}: a type, or one for each end of the axis."""
    sides = []
    for axis in "xy":
        ends = given.get(axis, ())
        ends = tuple(str(end).upper() for end in ((ends, ends) if isinstance(ends, str) else ends))
        if len(ends) != 2 or not set(ends) <= set(BOUNDARY_TYPES) or ends.count("PERIODIC") == 1:
            raise UserError(
                f"boundary of {axis}: expected periodic, wall or open, or two of the latter for its lower and upper "
                f"end; got {given.get(axis)!r}"
            )
        sides.append((ends[0], ends[1]))
    if set(given) - set("xy"):
        raise UserError(f"boundary: expected the axes x and y, got {', '.join(map(repr, given))}")
    return sides[0], sides[1]


def divide(count: int, fractions: Sequence[float], seed: int) -> dict[str, list[int]]:
    """Divide trajectories 0 to count - 1 by fractions for train, valid and test, by hashes of `seed` and number.

    A split with a fraction above 0 gets at least one trajectory. UserError if there are too few.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise UserError(
            "split: expected 3 fractions for train, valid and test that add up to 1, got "
            f"{', '.join(map(str, fractions))}"
        )
    wanted = [split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    if count < len(wanted):
        raise UserError(
            f"split: {count} {'trajectory cannot' if count == 1 else 'trajectories cannot'} be divided into "
            f"{', '.join(wanted)} (whole trajectories go to one split). Split 1,0,0 puts all into train; then train "
            "with `validation.every=0`, and score the model on other data"
        )
    left, order = list(range(count)), {}
    for split in ("test", "valid"):
        share = fractions[SPLITS.index(split)]
        size = min(max(1, round(share * count)), len(left) - (fractions[0] > 0)) if share else 0
        chosen = nested_choice([(seed, "split", index) for index in left], size)
        order[split] = [left[place] for place in chosen]
        left = [index for index in left if index not in set(order[split])]
    order["train"] = left
    if not fractions[0] and left:  # what rounding has left over
        order["valid" if fractions[1] else "test"] += left
        order["train"] = []
    return {split: sorted(order[split]) for split in SPLITS if order[split]}


@contextmanager
def whole_folder(folder: Path, name: str) -> Iterator[Path]:
    """Give a temporary folder that becomes <folder>/<name> when the block ends, or is removed if it fails.

    UserError for a name that is not allowed or taken, and for a folder that cannot be written.
    """
    _check_names([name], "dataset")
    if (folder / name).exists():
        raise UserError(
            f"{folder / name}: it is already there, and is not overwritten; remove it or choose another name"
        )
    try:
        with atomic_path(folder / name) as temporary:
            temporary.mkdir()
            yield temporary
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error


def write_dataset(
    target: Path,
    name: str,
    source: Trajectories,
    split: Mapping[str, Sequence[int]],
    on_frame: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the splits of the dataset `name` below the folder `target`. Memory holds one frame.

    split: which trajectories go to train, valid and test. UserError for NaN, Inf and numbers beyond float32, naming
    trajectory, field and frame, and for a full disk.
    """
    _check_split(split, len(source.times))
    frame_bytes = 4 * len(source.channels("state")) * len(source.x) * len(source.y)
    needed = sum(len(source.times[index]) for chosen in split.values() for index in chosen) * frame_bytes
    if needed > (free := free_bytes(target)):
        raise UserError(
            f"{target.parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; free some space"
        )
    for part, chosen in split.items():
        by_length: dict[int, list[int]] = {}
        for index in chosen:
            by_length.setdefault(len(source.times[index]), []).append(index)
        for length, group in by_length.items():
            suffix = f"_{length}_frames" if len({len(times) for times in source.times}) > 1 else ""
            path = target / "data" / part / f"{name}{suffix}.hdf5"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_file(path, name, source, group, on_frame)


def _check_split(split: Mapping[str, Sequence[int]], count: int) -> None:
    indices = [index for chosen in split.values() for index in chosen]
    if not set(split) <= set(SPLITS) or not indices or len(set(indices)) < len(indices):
        raise UserError(f"split: expected trajectories of {', '.join(SPLITS)}, each in one of them; got {dict(split)}")
    if not all(0 <= index < count for index in indices):
        raise UserError(f"split: expected trajectories from 0 to {count - 1}, got {indices}")


def _write_file(
    path: Path, name: str, source: Trajectories, group: Sequence[int], on_frame: Callable[[int], None]
) -> None:
    grid = (len(source.x), len(source.y))
    state = tuple(one for one in source.fields if one.role == "state")
    constant = tuple(one for one in source.fields if one.role == "constant")
    card = Card(name, "", state, source.boundary, grid, dt=None, constant=constant)
    # The constant fields follow one by one: this view of a single zero takes no memory.
    blank = np.broadcast_to(np.float32(0), (len(group), len(card.constant_channels), *grid))
    scalars = {key: values[list(group)] for key, values in source.scalars.items()}
    setting = Setting(card, source.x, source.y, blank, scalars, edges(source.boundary, grid))
    with WellWriter(path, setting, np.stack([source.times[index] for index in group])) as writer:
        for one, attributes in source.attributes.items():
            writer.describe(attributes, one)
        for place, index in enumerate(group):
            where = source.label(index)
            if constant:
                writer.write_constants(place, _float32(source.constants(index), card.constant_channels, where))
            for time_index, frame in enumerate(source.frames(index)):
                values = _float32(frame, card.state_channels, f"{where}, frame {time_index}")
                writer.write(time_index, values[None], slice(place, place + 1))
                on_frame(1)


def _float32(values: np.ndarray, channels: Sequence[str], where: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = values.astype(np.float32, copy=False)
    if np.isfinite(single).all():
        return single
    bad = next(index for index in range(len(channels)) if not np.isfinite(single[index]).all())
    beyond = np.isfinite(values[bad]).all()
    raise UserError(
        f"{where}, {channels[bad]}: expected finite numbers, got "
        + (
            f"{np.abs(values[bad]).max():.3g}, which is beyond float32; scale the field"
            if beyond
            else f"{int((~np.isfinite(single[bad])).sum())} NaN, Inf or missing values; fill them, or leave the "
            "trajectory out"
        )
    )


def write_well(
    folder: str | Path,
    name: str,
    fields: Mapping[str, Any],
    t: Any = None,
    x: Any = None,
    y: Any = None,
    *,
    boundary: Mapping[str, str | Sequence[str]],
    constants: Mapping[str, Any] | None = None,
    scalars: Mapping[str, Any] | None = None,
    units: Mapping[str, str] | None = None,
    split: Sequence[float] | Mapping[str, Sequence[int]] = FRACTIONS,
    seed: int = 0,
) -> Path:
    """Write arrays as the dataset `name` in the Well's layout, whole or not at all, and return its folder.

        write_well("data", "burgers", {"velocity": u}, t, x, y, boundary={"x": "periodic", "y": "wall"})
        write_well("data", "burgers", xarray.open_dataset("burgers.nc"), boundary={"x": "periodic", "y": "wall"})

    Args:
        folder: the dataset becomes <folder>/<name>/data/{train,valid,test}/<name>.hdf5.
        name: letters, digits and underscores.
        fields: name -> (N, T, X, Y) for a scalar field, (N, T, X, Y, 2) for a vector (x, y), (N, T, X, Y, 2, 2) for a
            tensor (xx, xy; yx, yy): numpy arrays, h5py datasets or others that are indexed like them, read frame by
            frame. Or an xarray Dataset, whose dimensions are told by their names (sample, time, x, y, in any order; N
            may be missing); t, x, y and units come from it where they are not given.
        t: times (T,), or (N, T) where trajectories differ; evenly spaced.
        x: grid points (X,) along axis 2 of the arrays.
        y: grid points (Y,) along axis 3.
        boundary: "periodic", "wall" or "open" for x and for y, or a pair for the lower and the upper end.
        constants: fields that do not change in time: name -> (X, Y), or (N, X, Y) where trajectories differ.
        scalars: parameters such as a viscosity: name -> a number, or (N,) where trajectories differ.
        units: field -> unit. They are stored with the field, and `data-pipeline register` puts them into the card.
        split: fractions of the trajectories for train, valid and test, or {"train": [0, 1, ...], "valid": ...}.
        seed: of the division by fractions.

    Raises UserError (of data_pipeline.files) for arrays that do not fit together and for values that are not finite.
    """
    if hasattr(fields, "data_vars"):
        read, points, found = _from_xarray(fields)
        t, x, y = (points.get(axis) if own is None else own for axis, own in (("t", t), ("x", x), ("y", y)))
        units = {**found, **(units or {})}
    else:
        read = dict(fields)
    if any(axis is None for axis in (t, x, y)):
        raise UserError("expected the times t and the grid points x and y, got none for one of them; pass them")
    times, points_x, points_y = seconds(np.asarray(t)), np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not read:
        raise UserError("expected at least one field, got none")
    count = int(next(iter(read.values())).shape[0])
    grid = (points_x.size, points_y.size)
    constant = {key: np.ma.asanyarray(values) for key, values in (constants or {}).items()}
    for key, values in read.items():
        _check_shape(key, values, (count, times.shape[-1], *grid), "(trajectory, time, x, y)", (4, 5, 6))
    for key, values in constant.items():
        _check_shape(key, values, (count, *grid)[3 - values.ndim :], "(x, y) or (trajectory, x, y)", (2, 3))
    state = sorted((make_field(key, values.ndim - 4) for key, values in read.items()), key=lambda one: one.order)
    if times.shape not in (times.shape[-1:], (count, times.shape[-1])):
        raise UserError(f"t: expected the shape (T,) or ({count}, T), got {times.shape}")
    for key in units or {}:
        if key not in read and key not in constant:
            raise UserError(f"units: expected names of fields ({', '.join([*read, *constant])}), got {key!r}")

    def frames(index: int) -> Iterator[np.ndarray]:
        for time_index in range(times.shape[-1]):
            parts = [_plain(read[one.name][index, time_index], one.name) for one in state]
            yield np.concatenate([_channels_first(part) for part in parts])

    def constants_of(index: int) -> np.ndarray:
        parts = [_plain(values if values.ndim == 2 else values[index], key) for key, values in constant.items()]
        return np.stack(parts) if parts else np.empty((0, *grid))

    source = Trajectories(
        fields=(*state, *(make_field(key, 0, "constant") for key in constant)),
        times=list(np.broadcast_to(times, (count, times.shape[-1]))),
        x=points_x,
        y=points_y,
        boundary=parse_boundary(boundary),
        frames=frames,
        constants=constants_of,
        scalars={key: _per_trajectory(key, one, count) for key, one in (scalars or {}).items()},
        attributes={key: {"units": unit} for key, unit in (units or {}).items()},
    )
    chosen = split if isinstance(split, Mapping) else divide(count, split, seed)
    with whole_folder(Path(folder), name) as target:
        write_dataset(target, name, source, chosen)
    return Path(folder) / name


def _from_xarray(given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return an xarray Dataset's variables in the order n, t, x, y, its coordinates by axis, and its units."""
    axes = {str(dim): axis_of(str(dim)) for dim in given.dims}
    if sorted(axis or "" for axis in axes.values() if axis != "n") != ["t", "x", "y"]:
        raise UserError(
            f"expected the dimensions time, x, y, and maybe one that counts trajectories, got {', '.join(axes)}; "
            "rename them with Dataset.rename"
        )
    dims = {axis: dim for dim, axis in axes.items()}
    full = given if "n" in dims else given.expand_dims("trajectory")
    order = [dims.get("n", "trajectory"), dims["t"], dims["x"], dims["y"]]
    read = {str(key): values.transpose(*order) for key, values in full.data_vars.items()}
    points = {axis: given[dims[axis]].values for axis in "txy" if dims[axis] in given.coords}
    return read, points, {key: str(values.attrs["units"]) for key, values in read.items() if "units" in values.attrs}


def _check_shape(name: str, values: Any, expected: tuple[int, ...], axes: str, ndims: tuple[int, ...]) -> None:
    kind = np.dtype(values.dtype).kind
    if kind not in "iufb":
        hint = "; write its real and imaginary part as two fields" if kind == "c" else ""
        raise UserError(f"{name}: expected real numbers, got {values.dtype}{hint}")
    shape = tuple(values.shape)
    if len(shape) not in ndims or shape != expected + (2,) * (len(shape) - len(expected)):
        raise UserError(
            f"{name}: expected the shape {expected}, axes {axes}, and 2 for each index of a vector or tensor; "
            f"got {shape}"
        )


def _per_trajectory(name: str, value: Any, count: int) -> np.ndarray:
    numbers = np.asarray(value, np.float64)
    if numbers.shape not in ((), (1,), (count,)):
        raise UserError(f"scalar {name}: expected a number, or {count} of them, got the shape {numbers.shape}")
    return np.broadcast_to(numbers, (count,))


def _plain(values: Any, name: str) -> np.ndarray:
    """Return part of an array as a numpy array. UserError if a value of it is masked."""
    if np.ma.is_masked(values):
        raise UserError(f"{name}: expected a value at every point, got masked ones; fill them before writing")
    return np.asarray(values)


def _channels_first(values: np.ndarray) -> np.ndarray:
    """Return (X, Y) + (2,) * order as (components, X, Y)."""
    return np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)

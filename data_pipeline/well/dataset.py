"""A dataset in the Well's layout from data that come frame by frame, checked and divided into splits.

Files are <folder>/<name>/data/{train,valid,test}/<name>.hdf5. Trajectories of another length have a file of their own.

Array legend: N trajectories, T frames, C state channels, K constant channels, X Y grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_path, free_bytes
from data_pipeline.hashing import nested_choice
from data_pipeline.registry import BOUNDARY_TYPES, Boundary, Card, Field
from data_pipeline.schema import NAME
from data_pipeline.well.hdf5 import MAX_FRAME_BYTES, SPLITS, Setting
from data_pipeline.well.layout import edges
from data_pipeline.well.survey import COMPONENTS
from data_pipeline.well.write import WellWriter

FRACTIONS = (0.8, 0.1, 0.1)  # of the trajectories, for train, valid and test
AXIS_NAMES = {  # axis -> what files call it, in lower case
    "n": (
        *("n", "sample", "samples", "trajectory", "trajectories", "traj", "batch", "run", "runs", "simulation"),
        *("member", "ensemble", "realization", "seed"),
    ),
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
    with WellWriter(path, setting, np.stack([_told_apart(source.times[index]) for index in group])) as writer:
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


def _told_apart(times: np.ndarray) -> np.ndarray:
    """Return the times, counted from the first one where float32 could not tell late ones apart."""
    rounding = float(np.finfo(np.float32).eps) * float(np.abs(times).max())
    return times - times[0] if rounding > _SAME_STEP * np.diff(times).min() else times


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

"""What the HDF5 files of a dataset without a card hold: fields, grid, boundary, times, and figures over a few frames.

All but the fields is read by WellFile with a provisional card, so a dataset that can be surveyed can also be converted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.registry import Boundary, Card, Domain, Field
from data_pipeline.schema import NAME
from data_pipeline.well.findings import Finding, Spacing, condense, even_step, spacing_findings
from data_pipeline.well.hdf5 import WellFile
from data_pipeline.well.layout import attribute, flags, hdf5_errors, plain_dataset, plain_group, texts
from data_pipeline.well.stats import Moments, pool

SAMPLE_TRAJECTORIES = 8  # spread evenly over all files
SAMPLE_FRAMES = 4  # of each, spread evenly from the first to the last
COMPONENTS = (("",), ("_x", "_y"), ("_xx", "_xy", "_yx", "_yy"))  # by tensor order
_SAME_DT = 1e-3  # relative difference that rounding of float32 times may leave


@dataclass(frozen=True)
class SampledFrames:
    """Statistics of a few frames of a few trajectories."""

    num_frames: int  # without NaN and Inf; the figures are taken over these
    figures: Mapping[str, tuple[float, float, float, float]]  # channel -> mean, std, lowest, highest; may be empty
    twins: Mapping[str, str]  # C_yx -> C_xy where they were equal in every frame
    nonfinite: tuple[str, ...]  # channels that held NaN or Inf


@dataclass(frozen=True)
class Survey:
    """What the files hold. Channels have the names their fields suggest: `density`, `velocity_x`, `C_xy`."""

    fields: tuple[Field, ...]  # state then constant, t0 to t2, each in the first file's order
    grid: tuple[int, int]
    boundary: Boundary
    scalars: tuple[str, ...]
    attributes: Mapping[str, Mapping[str, str]]  # field -> units and long_name, where the files have them
    domain: Domain | None  # lower and upper end of x, y; None if uneven
    dts: tuple[float, float] | None  # least and greatest time between frames; None if it differs in a trajectory
    lengths: tuple[tuple[int, int], ...]  # (trajectories, frames of each), shortest first; of the train files if any
    sample: SampledFrames
    findings: tuple[Finding, ...]  # about times and axes

    @property
    def dt(self) -> float | None:
        """Time between frames; None if it differs, or if times do not increase."""
        least, greatest = self.dts or (0.0, 0.0)
        return greatest if least > 0 and greatest - least <= _SAME_DT * greatest else None


def survey(name: str, files: Sequence[Path], train: Sequence[Path], shared: Callable[[Field], bool]) -> Survey:
    """Read the headers of all `files`, and a bounded sample of `train` (or of all of them where that is empty).

    `name` is the dataset's. Channels of fields that are not `shared` with other datasets begin with it. UserError for
    a file that is not 2D cartesian data in the Well's layout, naming it and what was found, and for files that differ
    in fields, grid or boundaries: one card cannot describe them all.
    """
    fields = tuple(field if shared(field) else _namespaced(field, name) for field in read_header(files[0]))
    card = provisional_card(name, fields)
    with WellFile(files[0], card) as first:
        grid, boundary, scalars, axes = first.grid, first.boundary, tuple(first.scalars(0)), first.axes()
    _check_periodic(boundary, files[0])
    shapes: dict[Path, tuple[int, int]] = {}  # (trajectories, frames)
    dts: list[float | None] = []
    findings: list[Finding] = []
    spacings: list[tuple[str, Spacing | None]] = []
    for path in files:
        with WellFile(path, card) as file:
            if (file.grid, file.boundary) != (grid, boundary):
                raise UserError(
                    f"{path}: expected grid and boundaries as in {files[0]}, {grid} and {boundary}, got {file.grid} "
                    f"and {file.boundary}; a card describes one of them, so put the others into a dataset of their own"
                )
            shapes[path] = file.num_trajectories, file.num_frames
            findings += file.findings()
            spacings.append((path.name, file.spacing))
            if file.num_frames > 1:
                dts += [file.dt(trajectory) for trajectory in range(file.num_trajectories)]
    counted, known = train or files, [dt for dt in dts if dt is not None]
    lengths = Counter[int]()
    for path in counted:
        lengths[shapes[path][1]] += shapes[path][0]
    return Survey(
        fields=fields,
        grid=grid,
        boundary=boundary,
        scalars=scalars,
        attributes=_attributes(files[0], fields),
        domain=_domain(axes, boundary),
        dts=None if len(known) < len(dts) else (min(known, default=0.0), max(known, default=0.0)),
        lengths=tuple((lengths[frames], frames) for frames in sorted(lengths)),
        sample=_sample(counted, shapes, card),
        findings=tuple(condense([*findings, *spacing_findings(spacings)], sum(count for count, _ in shapes.values()))),
    )


def read_header(path: Path) -> tuple[Field, ...]:
    """Return the fields of a file. UserError for what is no HDF5 file, not the Well's layout, or not 2D cartesian."""
    with hdf5_errors(str(path)), h5py.File(path, "r") as file:
        _check_axes(file, path)
        found = [field for order in range(3) for field in _group_fields(file, order, path)]
    fields = (*(f for f in found if f.role == "state"), *(f for f in found if f.role == "constant"))
    if not fields or fields[0].role != "state":
        raise UserError(
            f"{path}: expected fields that change in time, listed by the attribute field_names of t0_fields, t1_fields "
            "or t2_fields, got none; there is nothing to predict"
        )
    channels = Counter(channel for field in fields for channel in field.channels)
    for twice in (channel for channel, count in channels.items() if count > 1):
        owners = " and ".join(field.name for field in fields if twice in field.channels)
        raise UserError(f"{path}: the fields {owners} would both be the channel {twice}; rename one in the files")
    return fields


def _namespaced(field: Field, dataset: str) -> Field:
    """Return the field with channels of the dataset's own: `u` of two datasets need not be one quantity."""
    channels = tuple(f"{dataset}_{channel}" for channel in field.channels)
    if (excess := max(map(len, channels)) - 64) > 0:
        raise UserError(
            f"--name {dataset}: expected a name shorter by {excess} letters for channels such as {channels[0]}"
        )
    return replace(field, channels=channels)


def _domain(axes: Sequence[np.ndarray], boundary: Boundary) -> Domain | None:
    """Return the ends of both axes; None unless their points ascend evenly."""
    x, y = (even_step(points) or 0.0 for points in axes)
    return (_interval(axes[0], boundary[0]), _interval(axes[1], boundary[1])) if min(x, y) > 0 else None


def _interval(points: np.ndarray, ends: Sequence[str]) -> tuple[float, float]:
    """Return the lower and upper end of an axis: one spacing more than from the first point to the last.

    Points of a periodic axis that are multiples of the spacing stand at the lower ends of their cells, all others at
    the centers.
    """
    spacing = float(points[-1] - points[0]) / (len(points) - 1)
    place = float(points[0]) / spacing
    low = float(points[0]) - (0.0 if ends[0] == "PERIODIC" and abs(place - round(place)) < 0.25 else spacing / 2)
    return float(f"{low:.6g}"), float(f"{low + spacing * len(points):.6g}")


def _attributes(path: Path, fields: Sequence[Field]) -> dict[str, dict[str, str]]:
    with hdf5_errors(str(path)), h5py.File(path, "r") as file:
        stored = {field.name: file[f"t{field.order}_fields"][field.name].attrs for field in fields}
        return {
            name: {key: " ".join(texts(attrs[key])) for key in ("units", "long_name") if key in attrs}
            for name, attrs in stored.items()
        }


def provisional_card(name: str, fields: tuple[Field, ...]) -> Card:
    """Return a card that lets WellFile read fields that no card describes yet."""
    state = tuple(field for field in fields if field.role == "state")
    constant = tuple(field for field in fields if field.role == "constant")
    ends = ("OPEN", "OPEN")
    return Card(name, "", state, boundary=(ends, ends), grid=(2, 2), dt=None, constant=constant)


def _check_axes(file: h5py.File, path: Path) -> None:
    axes = texts(attribute(plain_group(file, "dimensions", f"{path}: dimensions"), "spatial_dims"))
    grid_type = texts(file.attrs.get("grid_type", "cartesian"))
    if axes != ["x", "y"] or [kind.lower() for kind in grid_type] != ["cartesian"]:
        raise UserError(
            f"{path}: expected 2D data on a cartesian grid, axes x, y; got {len(axes)}D data on the grid "
            f"{', '.join(grid_type)!a}, axes {', '.join(axes)!a}; only the former can be registered"
        )


def _check_periodic(boundary: Boundary, path: Path) -> None:
    for axis, ends in zip("xy", boundary, strict=True):
        if ends.count("PERIODIC") == 1:
            raise UserError(
                f"{path}: boundary_conditions: {axis} is {ends[0]} at its lower and {ends[1]} at its upper end; "
                "expected PERIODIC at both or at neither, so let the mask hold at both ends"
            )


def _group_fields(file: h5py.File, order: int, path: Path) -> list[Field]:
    where = f"{path}: t{order}_fields"
    group = plain_group(file, f"t{order}_fields", where)
    fields = []
    for name in texts(attribute(group, "field_names")):
        if not NAME.fullmatch(name):
            raise UserError(
                f"{where}: field {name[:80]!a}: expected up to 64 letters, digits and underscores, a letter first; "
                "rename it in the files"
            )
        (time_varying,) = flags(plain_dataset(group, name, f"{where}/{name}"), "time_varying")
        channels = tuple(name + component for component in COMPONENTS[order])
        fields.append(Field(name, order, "state" if time_varying else "constant", channels))
    return fields


def _sample(files: Sequence[Path], shapes: Mapping[Path, tuple[int, int]], card: Card) -> SampledFrames:
    channels = card.state_channels + card.constant_channels
    moments: list[Moments] = []
    extremes: list[tuple[np.ndarray, np.ndarray]] = []
    twins = {field.channels[2]: field.channels[1] for field in card.fields if field.order == 2}
    nonfinite: set[str] = set()
    for frame in _sampled_frames(files, shapes, card):
        finite = np.isfinite(frame).all(axis=(1, 2))
        nonfinite |= {name for name, good in zip(channels, finite, strict=True) if not good}
        by_name = dict(zip(channels, frame, strict=True))
        twins = {yx: xy for yx, xy in twins.items() if np.array_equal(by_name[yx], by_name[xy])}
        if finite.all():
            moments.append(Moments.of(frame, (1, 2)))
            extremes.append((frame.min(axis=(1, 2)), frame.max(axis=(1, 2))))
    figures = {}
    if moments:
        pooled, (lowest, highest) = pool(moments), zip(*extremes, strict=True)
        table = np.stack([pooled.mean, pooled.std, np.min(lowest, axis=0), np.max(highest, axis=0)], axis=1)
        figures = dict(zip(channels, map(tuple, table.tolist()), strict=True))
    ordered = tuple(name for name in channels if name in nonfinite)
    return SampledFrames(len(moments), figures, twins, ordered)


def _sampled_frames(files: Sequence[Path], shapes: Mapping[Path, tuple[int, int]], card: Card) -> Iterator[np.ndarray]:
    """Yield single frames with the constant fields behind: (C + K, H, W)."""
    first = np.cumsum([0, *(shapes[path][0] for path in files)])  # the number of each file's first trajectory
    for number in _spread(first[-1], SAMPLE_TRAJECTORIES):
        owner = int(np.searchsorted(first, number, side="right")) - 1
        trajectory = int(number - first[owner])
        with WellFile(files[owner], card) as file:
            constants = file.constants(trajectory)
            for time_index in _spread(file.num_frames, SAMPLE_FRAMES):
                yield np.concatenate([file.read(trajectory, time_index, time_index + 1)[0], constants])


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0 to count - 1, evenly spread, both ends among them."""
    found: list[int] = np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()
    return found

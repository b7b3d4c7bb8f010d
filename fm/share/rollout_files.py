"""The files of a rollout: initial frames from Well HDF5, netCDF or zarr files, and predictions into them.

In netCDF and zarr, variables are named by canonical channel, or as the Well names the components of its fields
(`velocity_x`, `D_xx`). Their dimensions are `x` and `y`, optionally `time`, and optionally one more, which counts
trajectories. A prediction has the dimensions trajectory, time, x, y and one variable for each channel, so it can be
the input of another rollout.

Array legend: n trajectories, T frames, C state channels, X Y grid; channels are in the card's order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.importer.arrays import check_zarr, import_xarray
from data_pipeline.registry import Card, Registry
from data_pipeline.well.findings import Spacing, axis_finding, even_step, mean_spacing, times_finding
from data_pipeline.well.hdf5 import CF_ATTRIBUTES, Setting, WellFile, read_attributes, read_setting, stored_card
from data_pipeline.well.layout import edges
from data_pipeline.well.survey import COMPONENTS
from data_pipeline.well.write import OutputFile, WellWriter

WELL_SUFFIXES = (".hdf5", ".h5")
ENGINES = {".nc": "h5netcdf", ".zarr": "zarr"}  # suffix -> engine of xarray
DIMENSIONS = ("trajectory", "time", "x", "y")


@dataclass(frozen=True)
class InitialStates:
    """The last frames that a model is given, of each of n trajectories."""

    setting: Setting
    trajectories: tuple[int, ...]  # their numbers in the file
    frames: np.ndarray  # (n, T, C, X, Y) float32, the oldest first
    times: np.ndarray  # (n, F) physical, of all F frames of the file
    last: int  # which of them is the last one given
    spacing: Spacing | None  # of the grid's points; None if the file has no axes

    @property
    def dt(self) -> float | None:
        """The time between the file's frames; None if it has one frame, or they are not evenly apart."""
        steps = [even_step(row) for row in self.times]
        return None if None in steps else float(np.median(np.array(steps, np.float64)))

    def predicted_times(self, steps: int, dt: float) -> np.ndarray:
        """Return the times of the last given frame and of `steps` predictions, (n, 1 + steps).

        They are those of the file as far as it goes. Beyond its end they go on with its even step, or else with its
        last one, and with `dt` if it has one frame.
        """
        rows = []
        for row in self.times:
            own = row[self.last : self.last + 1 + steps]
            step = dt if len(row) == 1 else even_step(row) or row[-1] - row[-2]
            rows.append(np.append(own, own[-1] + step * np.arange(1, steps + 2 - len(own))))
        return np.array(rows)

    def doubts(self) -> Iterator[str]:
        """Yield what is wrong with the file's times and axes."""
        for trajectory, row in zip(self.trajectories, self.times, strict=True):
            found = times_finding(row, "", trajectory)
            if found is not None:
                yield f"{found.where}: {found.detail}: predictions have the times of the file's frames"
        for axis, points in (("x", self.setting.x), ("y", self.setting.y)):
            found = axis_finding(axis, points, "")
            if found is not None:
                yield found.detail


def read_initial(
    path: Path,
    registry: Registry,
    dataset: str | None,
    trajectories: Sequence[int] | None,
    start: int | None,
    context: int = 1,
) -> InitialStates:
    """Read `context` frames of these trajectories, None for all, from a file; its suffix gives the format.

    The last one is frame `start`, by default the first that has enough frames before it. Raises UserError if the file
    is missing, damaged or another dataset's, or has no such trajectory or frames.
    """
    read = read_xarray if path.suffix in ENGINES else read_well
    return read(path, registry, dataset, trajectories, context - 1 if start is None else start, context)


def read_well(
    path: Path, registry: Registry, dataset: str | None, trajectories: Sequence[int] | None, start: int, context: int
) -> InitialStates:
    """Read from a Well file, as `read_initial`."""
    card = stored_card(path, registry, dataset, read_attributes(path))
    with WellFile(path, card) as file:
        chosen = _choose(path, file.num_trajectories, trajectories)
        _check_start(path, file.num_frames, start, context)
        times = np.stack([file.times(one) for one in chosen])
        _check_times(path, times)
        return InitialStates(
            setting=read_setting(file, chosen),
            trajectories=chosen,
            frames=np.stack([file.read(one, start + 1 - context, start + 1) for one in chosen]),
            times=times,
            last=start,
            spacing=file.spacing,
        )


def read_xarray(
    path: Path, registry: Registry, dataset: str | None, trajectories: Sequence[int] | None, start: int, context: int
) -> InitialStates:
    """Read from a netCDF or zarr file, as `read_initial`."""
    xarray = import_xarray()
    if not path.exists():
        raise UserError(f"{path}: expected fields to start from, found no such file")
    options: dict[str, Any] = {"engine": ENGINES[path.suffix], "decode_times": False}
    try:
        if path.suffix == ".zarr":
            check_zarr(path)
            options["consolidated"] = False  # what was checked, and not a copy of it
        given = xarray.open_dataset(path, **options)
    except UserError:
        raise
    except Exception as error:  # the backends raise errors of many types for bytes of another kind
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} by xarray ({error})") from error
    with given:
        card = stored_card(path, registry, dataset, given.attrs)
        fields = _by_channel(path, given, card)
        dims = dict.fromkeys(dim for name in card.state_channels for dim in fields[name].dims)
        others = [dim for dim in dims if dim not in DIMENSIONS[1:]]
        if not {"x", "y"} <= dims.keys() or len(others) > 1:
            raise UserError(
                f"{path}: expected the dimensions x, y, maybe time and one that counts trajectories, got "
                f"{', '.join(dims)}"
            )
        num_frames = fields.sizes.get("time", 1)
        _check_start(path, num_frames, start, context)
        times = _points(path, fields, "time") if "time" in fields.variables else np.arange(float(num_frames))
        _check_times(path, times)
        given_frames = slice(start + 1 - context, start + 1)
        frames = fields.isel(time=given_frames) if "time" in fields.dims else fields.expand_dims("time")
        counter = others[0] if others else "trajectory"
        chosen = _choose(path, frames.sizes[counter] if others else 1, trajectories)
        frames = frames.isel({counter: list(chosen)}) if others else frames.expand_dims(counter)
        states = [_stack(frames.isel(time=index), card.state_channels, counter) for index in range(context)]
        constants = _stack(frames.isel(time=-1), card.constant_channels, counter)
        x, y = (_points(path, frames, axis) for axis in "xy")
        scalars = {name: np.full(len(chosen), float(given.attrs[name])) for name in card.scalars if name in given.attrs}
        attributes = {
            name: {key: str(fields[name].attrs[key]) for key in CF_ATTRIBUTES if key in fields[name].attrs}
            for name in ("time", "x", "y")
            if name in fields.variables
        }
        setting = Setting(card, x, y, constants, scalars, edges(card.boundary, (len(x), len(y))), attributes)
        spacing = mean_spacing(x, y) if {"x", "y"} <= set(fields.variables) else None
        times = np.tile(times, (len(chosen), 1))
        return InitialStates(setting, chosen, np.stack(states, axis=1), times, start, spacing)


def _points(path: Path, fields: Any, name: str) -> np.ndarray:
    """Return the numbers of time, x or y, float64 (points,). UserError if it is curved, or holds no numbers."""
    values = np.atleast_1d(fields[name].values)
    if values.ndim > 1 or values.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: {name}: expected one number per point along it, got {values.dtype} of shape {values.shape}; "
            "interpolate to straight axes first"
        )
    return values.astype(np.float64)


def _choose(path: Path, count: int, trajectories: Sequence[int] | None) -> tuple[int, ...]:
    """Return the chosen of `count` trajectories. Raises UserError for one that is missing, or is chosen twice."""
    chosen = tuple(range(count)) if trajectories is None else tuple(trajectories)
    if not all(0 <= one < count for one in chosen) or len(set(chosen)) < len(chosen) or not chosen:
        raise UserError(
            f"--trajectory: expected numbers from 0 to {count - 1}, the trajectories of {path}, each once, or all; got "
            f"{' '.join(map(str, chosen)) or 'none'}"
        )
    return chosen


def _check_start(path: Path, count: int, start: int, context: int) -> None:
    if count < context:
        raise UserError(f"{path}: the model reads {context} frames, the file has {count}; give it more")
    if not context - 1 <= start < count:
        before = f"; the model reads {context} frames, the last of them this one" if context > 1 else ""
        raise UserError(
            f"--start: expected a frame from {context - 1} to {count - 1}, the frames of {path}{before}; got {start}"
        )


def _check_times(path: Path, times: np.ndarray) -> None:
    if not np.isfinite(times).all():
        raise UserError(f"{path}: expected times that are numbers, got NaN or infinity; write them anew")


def _by_channel(path: Path, given: Any, card: Card) -> Any:
    """Return the Dataset with its variables named by channel. Raises UserError unless they are the card's."""
    channels = (*card.state_channels, *card.constant_channels)
    named = {
        f"{field.name}{suffix}": channel
        for field in card.fields
        for suffix, channel in zip(COMPONENTS[field.order], field.channels, strict=True)
    }
    found = [named.get(name, name) if name not in channels else name for name in given.data_vars]
    if sorted(found) != sorted(channels):
        expected = [one if one == other else f"{one} (or {other})" for other, one in named.items()]
        raise UserError(
            f"{path}: expected the variables of {card.name}: {', '.join(expected)}; got {', '.join(given.data_vars)}"
        )
    return given.rename({old: new for old, new in zip(given.data_vars, found, strict=True) if old != new})


def _stack(frame: Any, names: Sequence[str], counter: str) -> np.ndarray:
    """Stack variables to float32 (n, channels, X, Y). A variable without `counter` is the same for all trajectories."""
    dims = (counter, "x", "y")
    sizes = [frame.sizes[dim] for dim in dims]
    stacked = np.empty((sizes[0], len(names), *sizes[1:]), np.float32)
    for index, name in enumerate(names):
        stacked[:, index] = frame[name].transpose(*(dim for dim in dims if dim in frame[name].dims)).values
    return stacked


def open_writer(
    suffix: str, path: Path, initial: InitialStates, times: np.ndarray, registry: Registry
) -> AbstractContextManager[WellWriter | NetcdfWriter | ZarrWriter]:
    """Open a file for n trajectories of T frames in the format of `suffix`; times (n, T).

    netCDF and zarr have one time axis: all rows of `times` must be equal.
    """
    if suffix in WELL_SUFFIXES:
        return WellWriter(path, initial.setting, times)
    setting = initial.setting
    coordinates = {"trajectory": np.array(initial.trajectories), "time": times[0], "x": setting.x, "y": setting.y}
    channels = (*setting.card.state_channels, *setting.card.constant_channels)
    cards = {name: registry.channel_cards[name] for name in channels}
    units: dict[str, Mapping[str, str]] = {**setting.attributes}
    units |= {name: {"units": card.unit, "long_name": card.description} for name, card in cards.items()}
    if suffix == ".nc":
        return closing(NetcdfWriter(path, setting, coordinates, units))
    return nullcontext(ZarrWriter(path, setting, coordinates, units))


@dataclass
class NetcdfWriter:
    """A netCDF file, written frame by frame."""

    path: Path
    setting: Setting
    coordinates: Mapping[str, np.ndarray]
    units: Mapping[str, Mapping[str, str]]  # channel or coordinate -> attributes

    def __post_init__(self) -> None:
        import h5netcdf

        self._output = OutputFile(self.path)
        self._file = h5netcdf.File(self._output, "w")
        self._file.dimensions = {name: len(points) for name, points in self.coordinates.items()}
        for name, points in self.coordinates.items():
            self._file.create_variable(name, (name,), data=points)
        for index, name in enumerate(self.setting.card.constant_channels):
            self._file.create_variable(name, ("trajectory", "x", "y"), data=self.setting.constants[:, index])
        for name in self.setting.card.state_channels:
            self._file.create_variable(name, DIMENSIONS, np.float32)
        for name, attributes in self.units.items():
            self._file.variables[name].attrs.update(attributes)

    def write(self, index: int, frame: np.ndarray) -> None:
        """Write frame number `index` of all trajectories (n, C, X, Y)."""
        for channel, name in enumerate(self.setting.card.state_channels):
            self._file.variables[name][:, index] = frame[:, channel]
        self._output.check()

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Write attributes of the file."""
        self._file.attrs.update(attributes)

    def close(self) -> None:
        """Close the file. OSError if it could not be written."""
        self._file.close()
        self._output.close()
        self._output.check()


@dataclass
class ZarrWriter:
    """A zarr folder, written frame by frame; each frame is a chunk."""

    path: Path
    setting: Setting
    coordinates: Mapping[str, np.ndarray]
    units: Mapping[str, Mapping[str, str]]  # channel or coordinate -> attributes

    def write(self, index: int, frame: np.ndarray) -> None:
        """Write frame number `index` of all trajectories (n, C, X, Y), after the one before."""
        card = self.setting.card
        variables: dict[str, Any] = {
            name: (DIMENSIONS, frame[:, None, channel], self.units[name])
            for channel, name in enumerate(card.state_channels)
        }
        options: dict[str, Any] = {"append_dim": "time"}
        if index == 0:
            options = {"encoding": {name: {"chunks": (1, 1, *frame.shape[2:])} for name in card.state_channels}}
            for channel, name in enumerate(card.constant_channels):
                constant = self.setting.constants[:, channel]
                variables[name] = (("trajectory", "x", "y"), constant, self.units[name])
        coordinates = {**self.coordinates, "time": self.coordinates["time"][index : index + 1]}
        import_xarray().Dataset(variables, coordinates).to_zarr(self.path, consolidated=False, **options)

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Write attributes of the file and of its axes, and the list of all arrays."""
        import zarr

        for name in self.coordinates:  # now, since xarray would decode times with units for every frame that it appends
            zarr.open_array(self.path / name, mode="r+").attrs.update(self.units.get(name, {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr format 3 does not specify the list of all arrays; xarray reads it
            import_xarray().Dataset(attrs=attributes).to_zarr(self.path, mode="a", consolidated=True)

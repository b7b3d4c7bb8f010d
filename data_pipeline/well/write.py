"""The only code that writes HDF5 files in the Well's layout: a whole file at once, or frame by frame.

Layout: the Well's data format (Ohana et al. 2024, "The Well"; docs/data_format.md of its repository) as
`the_well.data.WellDataset` 1.2 reads it. A file holds many trajectories of one parameter set, float32, fields of tensor
order 0, 1, 2 in the groups t0_fields, t1_fields, t2_fields. Axis 0 is x, axis 1 is y.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from data_pipeline.files import write_whole
from data_pipeline.registry import Field
from data_pipeline.well.hdf5 import Setting
from data_pipeline.well.layout import BoundaryMask

if TYPE_CHECKING:
    from typing_extensions import Buffer


def write_well_file(
    path: Path,
    dataset: str,
    axes: tuple[np.ndarray, np.ndarray, np.ndarray],
    state: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray] | None = None,
    scalars: Mapping[str, float] | None = None,
    boundaries: Sequence[BoundaryMask] = (),
) -> None:
    """Write n trajectories to `path`, whole or not at all.

    axes: time (T,), x (X,), y (Y,). state: float32 (n, T, X, Y) + (2,) * order by name. constants: float32 (X, Y), or
    (n, X, Y) where a field varies between trajectories. UserError if the file cannot be written.
    """
    # HDF5 reports a full disk late and as several exception types. An image in memory leaves that to one plain write.
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        _write_header(file, dataset, len(next(iter(state.values()))), axes, scalars or {}, boundaries)
        for order in range(3):
            here = {name: values for name, values in state.items() if values.ndim == 4 + order}
            names = [*here, *(constants or {})] if order == 0 else list(here)
            group = _field_group(file, order, names)
            for name, values in here.items():
                field = group.create_dataset(name, data=values)
                _mark_field(field, sample_varying=True, time_varying=True)
                if order == 2:
                    transposed = np.swapaxes(values, -1, -2)
                    field.attrs["symmetric"] = bool(np.array_equal(values, transposed))
                    field.attrs["antisymmetric"] = bool(np.array_equal(values, -transposed))
            for name in names[len(here) :]:
                values = (constants or {})[name]
                _mark_field(group.create_dataset(name, data=values), values.ndim == 3, time_varying=False)
    write_whole(path, image.getbuffer())


class OutputFile(io.FileIO):
    """A file for h5py to write to, where no operation fails: the first error is kept, and raised by `check`.

    HDF5 crashes the process when it closes a file after a write that failed, such as on a full disk.
    """

    error: OSError | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")

    def write(self, content: Buffer) -> int:
        """Write all bytes, unless an operation has failed."""
        view = memoryview(content).cast("B")
        with self._kept():
            left = view
            while left and self.error is None:
                left = left[super().write(left) :]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, unless that fails."""
        with self._kept():
            return super().truncate(size)
        return self.tell()

    def check(self) -> None:
        """Raise the first error."""
        if self.error is not None:
            raise self.error

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


class WellWriter:
    """An HDF5 file of n trajectories of T frames that come one by one, so memory does not grow with their number.

    Use it as a context manager; the file is whole when it ends. times: (n, T). Space for all frames is taken at once.
    OSError when the disk is full.
    """

    def __init__(self, path: Path, setting: Setting, times: np.ndarray) -> None:
        self._card = setting.card
        self._output = OutputFile(path)
        self._file = h5py.File(self._output, "w")
        time = times[0] if (times == times[0]).all() else times
        scalars = {
            name: float(values[0]) if (values == values[0]).all() else values
            for name, values in setting.scalars.items()
        }
        axes = (time, setting.x, setting.y)
        _write_header(self._file, setting.card.name, setting.num_trajectories, axes, scalars, setting.boundaries)
        for name, attributes in setting.attributes.items():
            self._file["dimensions"][name].attrs.update(attributes)
        self._fields: dict[str, h5py.Dataset] = {}  # state fields by name, (n, T, X, Y) + (2,) * order
        self._constants: dict[str, h5py.Dataset] = {}  # (n, X, Y) + (2,) * order
        for order in range(3):
            fields = [field for field in self._card.fields if field.order == order]
            group = _field_group(self._file, order, [field.name for field in fields])
            for field in fields:
                if field.role == "state":
                    shape = (*times.shape, *setting.grid, *(2,) * order)
                    made = self._fields[field.name] = group.create_dataset(field.name, shape, np.float32)
                else:
                    shape = (len(times), *setting.grid, *(2,) * order)
                    made = self._constants[field.name] = group.create_dataset(field.name, shape, np.float32)
                _mark_field(made, sample_varying=True, time_varying=field.role == "state")
                if order == 2:  # unknown before the frames have come
                    made.attrs.update({"symmetric": False, "antisymmetric": False})
        for number in range(len(times)):
            self.write_constants(number, setting.constants[number])

    def write(self, index: int, frames: np.ndarray, trajectories: slice = slice(None)) -> None:
        """Write frame number `index` of `trajectories`: (n, C, X, Y), channels in the card's state order."""
        for field in self._card.state:
            self._fields[field.name][trajectories, index] = _components(frames, self._card.state_channels, field)
        self._output.check()

    def write_constants(self, trajectory: int, values: np.ndarray) -> None:
        """Write the constant fields of one trajectory: (K, X, Y), channels in the card's constant order."""
        for field in self._card.constant:
            (self._constants[field.name][trajectory],) = _components(values[None], self._card.constant_channels, field)

    def describe(self, attributes: Mapping[str, float | str | list[int]], field: str | None = None) -> None:
        """Add attributes to a field, or to the file."""
        ({**self._fields, **self._constants}[field] if field else self._file).attrs.update(attributes)

    def __enter__(self) -> WellWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._output.close()
        self._output.check()


def _components(values: np.ndarray, channels: tuple[str, ...], field: Field) -> np.ndarray:
    """Return a field (n, X, Y) + (2,) * order from channels (n, C, X, Y)."""
    chosen = values[:, [channels.index(channel) for channel in field.channels]]
    return np.moveaxis(chosen, 1, -1).reshape(len(values), *values.shape[2:], *(2,) * field.order)


def _write_header(
    file: h5py.File,
    dataset: str,
    num_trajectories: int,
    axes: tuple[np.ndarray, np.ndarray, np.ndarray],
    scalars: Mapping[str, float | np.ndarray],
    boundaries: Sequence[BoundaryMask],
) -> None:
    """Write all but the fields. Time is (T,), a scalar is a number; (n, T) and (n,) where trajectories differ."""
    file.attrs["dataset_name"] = dataset
    file.attrs["grid_type"] = "cartesian"
    file.attrs["n_spatial_dims"] = 2
    file.attrs["n_trajectories"] = num_trajectories
    shared = {name: float(value) for name, value in scalars.items() if np.ndim(value) == 0}
    file.attrs["simulation_parameters"] = _texts(list(shared))  # each is an attribute of the file, one number
    file.attrs.update(shared)
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = _texts(["x", "y"])
    for name, values in zip(("time", "x", "y"), axes, strict=True):
        single = values.astype(np.float32)  # as the Well's files, unless it blurs the steps, as of seconds since 1970
        exact = np.allclose(np.diff(single.astype(np.float64)), np.diff(values), rtol=1e-3, atol=0)
        points = group.create_dataset(name, data=single if exact else values)
        points.attrs.update({"sample_varying": values.ndim == 2, "time_varying": name == "time"})
    group = file.create_group("scalars")
    group.attrs["field_names"] = _texts(list(scalars))
    for name, value in scalars.items():
        scalar = group.create_dataset(name, data=np.float32(value))
        scalar.attrs.update({"sample_varying": np.ndim(value) == 1, "time_varying": False})
    group = file.create_group("boundary_conditions")
    for boundary in boundaries:
        entry = group.create_group(boundary.name)
        entry.attrs["bc_type"] = boundary.kind
        entry.attrs["associated_dims"] = _texts(boundary.dims)
        entry.attrs["associated_fields"] = _texts([])
        entry.attrs.update({"sample_varying": False, "time_varying": False})
        entry.create_dataset("mask", data=boundary.mask)


def _field_group(file: h5py.File, order: int, names: Sequence[str]) -> h5py.Group:
    group = file.create_group(f"t{order}_fields")
    group.attrs["field_names"] = _texts(names)
    return group


def _mark_field(field: h5py.Dataset, sample_varying: bool, time_varying: bool) -> None:
    """Set the flags of a field that is there at every point of the grid."""
    field.attrs["dim_varying"] = [True, True]
    field.attrs["sample_varying"] = sample_varying
    field.attrs["time_varying"] = time_varying


def _texts(names: Sequence[str]) -> np.ndarray:
    """Return names as an attribute. Without the type, an empty list would become an array of float64."""
    return np.array(list(names), dtype=h5py.string_dtype())

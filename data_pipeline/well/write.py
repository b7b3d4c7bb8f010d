"""A file in the Well's layout whose frames come one by one, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from data_pipeline.registry import Field
from data_pipeline.well.hdf5 import Setting
from data_pipeline.well.layout import mark_field, strings, write_boundary, write_dimensions, write_root, write_scalars


class WellWriter:
    """An HDF5 file of n trajectories of T frames. Use it as a context manager; the file is whole when it ends.

    times: (n, T). Space for all frames is taken at once. OSError when the disk is full.
    """

    def __init__(self, path: Path, setting: Setting, times: np.ndarray) -> None:
        self._card = setting.card
        self._file = h5py.File(path, "w")
        same = bool((times == times[0]).all())
        scalars = {
            name: float(values[0]) if (values == values[0]).all() else values
            for name, values in setting.scalars.items()
        }
        write_root(self._file, setting.card.name, setting.num_trajectories, list(scalars))
        self.describe({name: value for name, value in scalars.items() if isinstance(value, float)})
        write_dimensions(self._file, times[0] if same else times, setting.x, setting.y)
        write_scalars(self._file, scalars)
        self._fields = self._make_fields(times.shape, setting)
        group = self._file.create_group("boundary_conditions")
        for boundary in setting.boundaries:
            write_boundary(group, boundary)

    def _make_fields(self, frames: tuple[int, ...], setting: Setting) -> dict[str, h5py.Dataset]:
        """Space for the state fields, by name, (n, T, X, Y) + (2,) * order; constant fields are written."""
        made = {}
        for order in range(3):
            group = self._file.create_group(f"t{order}_fields")
            fields = [field for field in self._card.fields if field.order == order]
            group.attrs["field_names"] = strings([field.name for field in fields])
            for field in fields:
                if field.role == "state":
                    made[field.name] = group.create_dataset(
                        field.name, (*frames, *setting.grid, *(2,) * order), np.float32
                    )
                else:
                    values = _components(setting.constants, self._card.constant_channels, field)
                    group.create_dataset(field.name, data=values)
                mark_field(group[field.name], sample_varying=True, time_varying=field.role == "state")
                if order == 2:  # of predictions nobody knows
                    group[field.name].attrs.update({"symmetric": False, "antisymmetric": False})
        return made

    def write(self, index: int, frame: np.ndarray) -> None:
        """Frame number `index` of all trajectories: (n, C, X, Y), channels in the card's state order."""
        for field in self._card.state:
            self._fields[field.name][:, index] = _components(frame, self._card.state_channels, field)

    def describe(self, attributes: Mapping[str, float | str | list[int]]) -> None:
        """More attributes of the file."""
        self._file.attrs.update(attributes)

    def __enter__(self) -> WellWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _components(values: np.ndarray, channels: tuple[str, ...], field: Field) -> np.ndarray:
    """A field (n, X, Y) + (2,) * order from channels (n, C, X, Y)."""
    chosen = values[:, [channels.index(channel) for channel in field.channels]]
    return np.moveaxis(chosen, 1, -1).reshape(len(values), *values.shape[2:], *(2,) * field.order)

"""netCDF and zarr, as xarray names what is in them: initial states from them, predictions into them.

Variables are named by canonical channel, or as the Well names the components of its fields (`velocity_x`, `D_xx`), over
`x` and `y`, maybe `time`, and maybe one more dimension, which counts trajectories. A prediction has the dimensions
trajectory, time, x, y and one variable for each channel, so that it can be an input again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from data_pipeline.cards.registry import Card, Registry
from data_pipeline.errors import UserError
from data_pipeline.well.boundary import edges
from data_pipeline.well.setting import Setting, stored_card
from data_pipeline.well.survey import COMPONENTS
from fm.prediction.initial import Initial, check_dts, check_start, choose

ENGINES = {".nc": "h5netcdf", ".zarr": "zarr"}
AXES = ("trajectory", "time", "x", "y")


def import_xarray() -> ModuleType:
    """xarray, with what it reads files by. UserError where the optional packages are missing."""
    try:
        import h5netcdf  # noqa: F401
        import xarray
        import zarr  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error}: netCDF and zarr need optional packages; install them with `launch/setup xarray`"
        ) from error
    return xarray


def read_xarray(
    path: Path, registry: Registry, dataset: str | None, trajectories: Sequence[int] | None, start: int
) -> Initial:
    """Frame `start` of these trajectories of a netCDF or zarr file; of all where None.

    UserError where it cannot be read, does not hold the dataset's channels, or has no such trajectory or frame.
    """
    xarray = import_xarray()
    if not path.exists():
        raise UserError(f"{path}: expected fields to start from, found no such file")
    try:
        given = xarray.open_dataset(path, engine=ENGINES[path.suffix], decode_times=False)
    except Exception as error:  # whatever the backends raise for bytes of another kind
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} by xarray ({error})") from error
    with given:
        return _initial(path, given, stored_card(path, registry, dataset, given.attrs), trajectories, start)


def _initial(path: Path, given: Any, card: Card, trajectories: Sequence[int] | None, start: int) -> Initial:
    fields = _by_channel(path, given, card)
    dims = dict.fromkeys(dim for name in card.state_channels for dim in fields[name].dims)
    others = [dim for dim in dims if dim not in AXES[1:]]
    if not {"x", "y"} <= dims.keys() or len(others) > 1:
        raise UserError(
            f"{path}: expected the dimensions x, y, maybe time and one that counts trajectories, got {', '.join(dims)}"
        )
    check_start(path, fields.sizes.get("time", 1), start)
    times = np.asarray(fields["time"].values if "time" in fields.coords else range(fields.sizes.get("time", 1)))
    times = np.atleast_1d(times).astype(np.float64)
    frame = fields.isel(time=start) if "time" in fields.dims else fields
    if others:
        chosen = choose(path, frame.sizes[others[0]], trajectories)
        frame = frame.isel({others[0]: list(chosen)})
    else:
        chosen = choose(path, 1, trajectories)
        frame = frame.expand_dims("trajectory")
    dims_of_one = (*(others or ["trajectory"]), "x", "y")
    dts = np.full(len(chosen), (times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else None
    if dts is not None:
        check_dts(path, dts)
    state, constants = (_stack(frame, names, dims_of_one) for names in (card.state_channels, card.constant_channels))
    x, y = (np.asarray(frame[axis].values, np.float64) for axis in "xy")
    scalars = {name: np.full(len(chosen), float(given.attrs[name])) for name in card.scalars if name in given.attrs}
    setting = Setting(card, x, y, constants, scalars, edges(card.boundary, (len(x), len(y))))
    return Initial(setting, chosen, state, np.full(len(chosen), times[start if len(times) > 1 else 0]), dts)


def _by_channel(path: Path, given: Any, card: Card) -> Any:
    """The Dataset with its variables named by channel. UserError unless they are the card's."""
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


def _stack(frame: Any, names: Sequence[str], dims: tuple[str, ...]) -> np.ndarray:
    """Variables as float32 (n, channels, X, Y); one without the first dimension is the same for all trajectories."""
    sizes = [frame.sizes[dim] for dim in dims]
    stacked = np.empty((sizes[0], len(names), *sizes[1:]), np.float32)
    for index, name in enumerate(names):
        own = [dim for dim in dims if dim in frame[name].dims]
        stacked[:, index] = frame[name].transpose(*own).values
    return stacked


class NetcdfWriter:
    """A netCDF file of n trajectories of T frames, which come one by one. times: (n, T), all rows the same."""

    def __init__(
        self, path: Path, setting: Setting, trajectories: Sequence[int], times: np.ndarray, registry: Registry
    ):
        import_xarray()
        import h5netcdf

        self._channels = setting.card.state_channels
        self._file = h5netcdf.File(path, "w")
        coordinates = _coordinates(setting, trajectories, times[0])
        self._file.dimensions = {name: len(points) for name, points in coordinates.items()}
        for name, points in coordinates.items():
            self._file.create_variable(name, (name,), data=points)
        for index, name in enumerate(setting.card.constant_channels):
            self._file.create_variable(name, ("trajectory", "x", "y"), data=setting.constants[:, index])
        for name in self._channels:
            self._file.create_variable(name, AXES, np.float32)
        for name in (*self._channels, *setting.card.constant_channels):
            self._file.variables[name].attrs.update(_meaning(registry, name))

    def write(self, index: int, frame: np.ndarray) -> None:
        """Frame number `index` of all trajectories: (n, C, X, Y)."""
        for channel, name in enumerate(self._channels):
            self._file.variables[name][:, index] = frame[:, channel]

    def describe(self, attributes: Mapping[str, Any]) -> None:
        self._file.attrs.update(attributes)

    def __enter__(self) -> NetcdfWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class ZarrWriter:
    """The same as a zarr folder; each frame is a chunk."""

    def __init__(
        self, path: Path, setting: Setting, trajectories: Sequence[int], times: np.ndarray, registry: Registry
    ):
        self._xarray, self._path, self._setting, self._registry = import_xarray(), path, setting, registry
        self._coordinates = _coordinates(setting, trajectories, times[0])

    def write(self, index: int, frame: np.ndarray) -> None:
        """Frame number `index` of all trajectories, which must come in order: (n, C, X, Y)."""
        card = self._setting.card
        coordinates = {**self._coordinates, "time": self._coordinates["time"][index : index + 1]}
        variables: dict[str, Any] = {
            name: (AXES, frame[:, None, channel], _meaning(self._registry, name))
            for channel, name in enumerate(card.state_channels)
        }
        if index == 0:
            variables |= {
                name: (("trajectory", "x", "y"), self._setting.constants[:, channel], _meaning(self._registry, name))
                for channel, name in enumerate(card.constant_channels)
            }
            chunks = {name: {"chunks": (1, 1, *frame.shape[2:])} for name in card.state_channels}
            self._xarray.Dataset(variables, coordinates).to_zarr(self._path, encoding=chunks, consolidated=False)
        else:
            self._xarray.Dataset(variables, coordinates).to_zarr(self._path, append_dim="time", consolidated=False)

    def describe(self, attributes: Mapping[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # format 3 does not specify the list of all arrays, which xarray looks for
            self._xarray.Dataset(attrs=attributes).to_zarr(self._path, mode="a", consolidated=True)

    def __enter__(self) -> ZarrWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _coordinates(setting: Setting, trajectories: Sequence[int], times: np.ndarray) -> dict[str, np.ndarray]:
    return {"trajectory": np.array(trajectories), "time": times, "x": setting.x, "y": setting.y}


def _meaning(registry: Registry, channel: str) -> dict[str, str]:
    card = registry.channel_cards[channel]
    return {"units": card.unit, "long_name": card.description}

"""The states that a rollout of a file starts from.

Array legend: n trajectories, C state channels, K constant channels, X Y grid; channels in the card's order.

netCDF and zarr, as xarray names what is in them: initial states from them, predictions into them.

Variables are named by canonical channel, or as the Well names the components of its fields (`velocity_x`, `D_xx`), over
`x` and `y`, maybe `time`, and maybe one more dimension, which counts trajectories. A prediction has the dimensions
trajectory, time, x, y and one variable for each channel, so that it can be an input again.

Rollouts from the states of a file into another file, frame by frame.

In Python, without files, on fields by name (fm/model/fields.py says which forms they may have):

    model = fm.WaveLiTFM.from_pretrained("hf://organisation/name")
    state = xarray.open_dataset("states.nc").isel(time=0)
    model.predict(state, "shear_flow", steps=20).to_netcdf("predicted.nc")

Array legend: n trajectories, C state channels, X Y grid.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.files import UserError, atomic_path, disk_full_error, is_disk_full
from data_pipeline.registry import Card, Registry, load_registry
from data_pipeline.well.hdf5 import Setting, WellFile, read_attributes, read_setting, stored_card
from data_pipeline.well.layout import edges
from data_pipeline.well.register import COMPONENTS
from data_pipeline.well.write import WellWriter
from fm.distributed import StopSignal, precision
from fm.evaluation.evaluate import TrainedModel
from fm.model.fields import FieldsWarning, given_fields
from fm.model.surrogate import MIN_GRID, Surrogate


@dataclass(frozen=True)
class Initial:
    """One frame of each of n trajectories."""

    setting: Setting
    trajectories: tuple[int, ...]  # their numbers in the file
    state: np.ndarray  # (n, C, X, Y) float32
    times: np.ndarray  # (n,) physical
    dts: np.ndarray | None  # (n,) time between the file's frames; None where it has one frame

    def time_axis(self, steps: int, step: float | None) -> np.ndarray:
        """Times (n, 1 + steps) from these frames on, `step` apart (1 if None) where the file does not say how much."""
        dts = np.full(len(self.times), 1.0 if step is None else step) if self.dts is None else self.dts
        return self.times[:, None] + np.arange(1 + steps) * dts[:, None]


def read_well(
    path: Path, registry: Registry, dataset: str | None, trajectories: Sequence[int] | None, start: int
) -> Initial:
    """Frame `start` of these trajectories of a Well file; of all where None.

    UserError where the file is missing, damaged or another dataset's, or has no such trajectory or frame.
    """
    card = stored_card(path, registry, dataset, read_attributes(path))
    with WellFile(path, card) as file:
        chosen = choose(path, file.num_trajectories, trajectories)
        check_start(path, file.num_frames, start)
        dts = None
        if file.num_frames > 1:
            dts = np.array([file.dt(one) for one in chosen])
            check_dts(path, dts)
        return Initial(
            setting=read_setting(file, chosen),
            trajectories=chosen,
            state=np.concatenate([file.read(one, start, start + 1) for one in chosen]),
            times=np.array([file.times(one)[start] for one in chosen]),
            dts=dts,
        )


def choose(path: Path, count: int, trajectories: Sequence[int] | None) -> tuple[int, ...]:
    """The chosen of `count` trajectories. UserError for one that is not there, or is chosen twice."""
    chosen = tuple(range(count)) if trajectories is None else tuple(trajectories)
    if not all(0 <= one < count for one in chosen) or len(set(chosen)) < len(chosen) or not chosen:
        raise UserError(
            f"--trajectory: expected numbers from 0 to {count - 1}, the trajectories of {path}, each once, or all; got "
            f"{' '.join(map(str, chosen)) or 'none'}"
        )
    return chosen


def check_start(path: Path, count: int, start: int) -> None:
    """UserError where there is no frame of this number."""
    if not 0 <= start < count:
        raise UserError(f"--start: expected a frame from 0 to {count - 1}, those of {path}; got {start}")


def check_dts(path: Path, dts: np.ndarray) -> None:
    """UserError where time does not go on."""
    if not (np.isfinite(dts) & (dts > 0)).all():
        raise UserError(f"{path}: expected times that increase from frame to frame, got steps of {dts.tolist()}")


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


BATCH = 8  # trajectories that the model takes at once
WELL_SUFFIXES = (".hdf5", ".h5")


class FrameWriter(Protocol):
    """A file whose frames come one by one."""

    def write(self, index: int, frame: np.ndarray) -> None: ...
    def describe(self, attributes: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Request:
    """What to predict."""

    source: Path
    out: Path
    steps: int
    dataset: str | None = None  # None: what the file says
    trajectories: tuple[int, ...] | None = None  # None: all
    start: int = 0  # frame of the source that the rollouts start from
    force: bool = False  # replace what is at `out`


def predict_file(model: str, request: Request, registry: str | None = None, progress: bool = True) -> Path:
    """Roll `model` out from the states of a file, and write initial states and predictions to `request.out`.

    `model` is a run, a checkpoint or an exported model; folders of cards, `registry`, take the place of its own.
    Prints what is doubtful to stderr as `warning: ...`. A rollout that stops being finite is written as the model says
    it, and told. UserError where model, file and request do not fit together; then nothing is written.
    """
    _check_request(request)
    out, trained = request.out, TrainedModel.open(model)
    cards = trained.registry() if registry is None else load_registry(registry)
    read = read_xarray if request.source.suffix in ENGINES else read_well
    initial = read(request.source, cards, request.dataset, request.trajectories, request.start)
    state, constants = _checked_fields(trained.model, initial, request.source)
    times = initial.time_axis(request.steps, trained.model.specs[initial.setting.card.name].dt)
    if out.suffix in ENGINES and not (times == times[0]).all():
        raise UserError(f"--out {out}: the trajectories have times of their own; write {WELL_SUFFIXES[0]}")
    frames = _frames(trained.model, initial.setting.card, state, constants, request.steps)
    try:
        with (
            StopSignal().listen() as stop,
            atomic_path(out) as path,
            _writer(out.suffix, path, initial, times, cards) as file,
        ):
            failures = _write(file, initial, _until(stop, frames), request.steps, progress)
            file.describe(_attributes(model, trained.weights, request, initial, failures))
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(out, error) from error
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    for trajectory, (step, channel) in failures.items():
        print(
            f"warning: trajectory {trajectory} is not finite from step {step} on, first in {channel}: what follows in "
            f"{out} is no prediction",
            file=sys.stderr,
        )
    return out


def _check_request(request: Request) -> None:
    source, out = request.source, request.out
    if out.suffix not in (*WELL_SUFFIXES, *ENGINES):
        raise UserError(f"--out {out}: expected a name that ends in {', '.join((*WELL_SUFFIXES, *ENGINES))}")
    if request.steps < 1:
        raise UserError(f"--steps: expected at least 1 step to predict, got {request.steps}")
    one, other = source.resolve(), out.resolve()
    if (
        one.is_relative_to(other)
        or other.is_relative_to(one)
        or (one.exists() and other.exists() and one.samefile(other))
    ):
        raise UserError(f"--out {out}: expected another file than the input, and none around or inside it")
    if out.exists() and not request.force:
        raise UserError(f"--out {out}: is there already; --force replaces it")
    if out.is_dir() and out.suffix != ".zarr":
        raise UserError(f"--out {out}: expected a file to write, got a folder")
    if out.is_file() and out.suffix == ".zarr":
        raise UserError(f"--out {out}: expected a folder to write, got a file")
    if {source.suffix, out.suffix} & ENGINES.keys():
        import_xarray()


def _checked_fields(model: Surrogate, initial: Initial, source: Path) -> tuple[Tensor, Tensor]:
    """State (n, C, X, Y) and constants (n, K, X, Y) as the model takes them; what is doubtful is told on stderr.

    UserError for a dataset that the model does not know, fields it cannot take, and values that are not finite.
    """
    card, grid = initial.setting.card, initial.setting.grid
    if card.name not in model.specs:
        raise UserError(
            f"{source}: expected a dataset that the model knows ({', '.join(model.specs)}), got {card.name}: --dataset "
            "names another"
        )
    if any(size % 2 or size < MIN_GRID for size in grid):
        raise UserError(
            f"{source}: expected an even number of at least {MIN_GRID} points along x and y, got {grid[0]} x {grid[1]}"
        )
    fields = {name: torch.from_numpy(initial.state[:, index]) for index, name in enumerate(card.state_channels)}
    constants = initial.setting.constants
    fields |= {name: torch.from_numpy(constants[:, index]) for index, name in enumerate(card.constant_channels)}
    dt = None if initial.dts is None else float(np.median(initial.dts))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FieldsWarning)
        try:
            given = given_fields(fields, model.specs[card.name], dt)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    for one in caught:
        print(f"warning: {source}: {one.message}", file=sys.stderr)
    return given.state, given.constants


def _frames(model: Surrogate, card: Card, state: Tensor, constants: Tensor, steps: int) -> Iterator[np.ndarray]:
    """Yield the predicted states (n, C, X, Y) step by step, channels in the card's order. A GPU is used if there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    order = [model.specs[card.name].state_channels.index(channel) for channel in card.state_channels]
    batches = zip(state.to(device).split(BATCH), constants.to(device).split(BATCH), strict=True)
    rollouts = [model.iterate(states, fixed, card.name, steps) for states, fixed in batches]
    for parts in zip(*rollouts, strict=True):
        yield torch.cat([part[:, order].cpu() for part in parts]).numpy()


def _until(stop: StopSignal, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames; KeyboardInterrupt between two of them once a signal came.

    Raised wherever the program is when the signal comes, it may be lost in a destructor of h5py's.
    """
    for frame in frames:
        if stop.received:
            raise KeyboardInterrupt
        yield frame


@precision(exact=True)
def _write(
    file: FrameWriter, initial: Initial, frames: Iterator[np.ndarray], steps: int, progress: bool
) -> dict[int, tuple[int, str]]:
    """Write the initial and the predicted states; returns trajectory -> first step and channel that was not finite.

    When no rollout is finite any more, the rest is NaN.
    """
    channels = initial.setting.card.state_channels
    failures: dict[int, tuple[int, str]] = {}
    file.write(0, initial.state)
    for step in tqdm(range(1, steps + 1), desc="rollout", unit="step", disable=not progress, leave=False):
        over = len(failures) == len(initial.trajectories)
        frame = np.full_like(initial.state, np.nan) if over else next(frames)
        file.write(step, frame)
        finite = np.isfinite(frame).all(axis=(2, 3))  # (n, C)
        for row in np.flatnonzero(~finite.all(axis=1)):
            failures.setdefault(initial.trajectories[row], (step, channels[int(finite[row].argmin())]))
    return failures


def _writer(
    suffix: str, path: Path, initial: Initial, times: np.ndarray, registry: Registry
) -> AbstractContextManager[FrameWriter]:
    if suffix in WELL_SUFFIXES:
        return WellWriter(path, initial.setting, times)
    kind = NetcdfWriter if suffix == ".nc" else ZarrWriter
    return kind(path, initial.setting, initial.trajectories, times, registry)


def _attributes(
    model: str, weights: str, request: Request, initial: Initial, failures: Mapping[int, tuple[int, str]]
) -> dict[str, Any]:
    """What tells a prediction from a simulation."""
    first: Sequence[int] = [failures.get(one, (0, ""))[0] for one in initial.trajectories]
    return {
        "dataset_name": initial.setting.card.name,
        "prediction_model": model,
        "prediction_weights": weights,
        "prediction_source": str(request.source),
        "prediction_trajectories": list(initial.trajectories),
        "prediction_start": request.start,
        "prediction_steps": request.steps,
        "prediction_first_nonfinite_step": first,  # of each trajectory; 0: none
        **{name: float(values[0]) for name, values in initial.setting.scalars.items() if (values == values[0]).all()},
    }

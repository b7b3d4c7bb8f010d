"""Fields by channel name, as users have them, and the tensors (B, n, C, H, W) that a model of n frames takes.

Three forms: dictionaries of numpy arrays, dictionaries of tensors, and xarray Datasets. A prediction has the form of
the given fields. Values are in physical units throughout.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fm.model.scalars import SAME, TIME_STEP, Scalars
from fm.model.spec import DatasetSpec

Fields: TypeAlias = Any  # dict[str, np.ndarray] | dict[str, torch.Tensor] | xarray.Dataset

# In standard deviations of the training data: means of a mini-Well frame are within 2 of theirs, spreads 0.008 to 2.4.
FAR = 10.0
FLAT = 2e-3
DT_TOLERANCE = 0.01
SPACING_TOLERANCE = 0.1  # points at both ends of a domain are further apart than cells, by 1 part in their number


class FieldsWarning(UserWarning):
    """Fields that a model can take, and that are probably not what it was trained for."""


@dataclass(frozen=True)
class GivenFields:
    """The last n frames of B states as tensors; `frame` and `series` turn predictions back into the given form."""

    spec: DatasetSpec
    frames: Tensor  # (B, n, C, H, W) float32, the oldest first
    constants: Tensor  # (B, K, H, W) float32
    batched: bool  # whether the given fields had an axis B
    given: Fields
    scalars: Scalars  # float64 () or (B,)

    def frame(self, state: Tensor, step: int) -> Fields:
        """Return a state (B, C, H, W), `step` steps after the last given one, in the given form."""
        arrays = self._by_channel(state)
        if not _is_xarray(self.given):
            return arrays
        return self._dataset(arrays, (), {} if self.spec.dt is None else {"time": self._times(np.array(step))})

    def series(self, states: Tensor) -> Fields:
        """Return states (B, T, C, H, W) in the given form, T before the axes of space."""
        arrays = self._by_channel(states)
        if not _is_xarray(self.given):
            return arrays
        return self._dataset(arrays, ("time",), {"time": self._times(np.arange(1, states.shape[1] + 1))})

    def _by_channel(self, states: Tensor) -> dict[str, Any]:
        """Turn (B, ..., C, H, W) into (B, ..., H, W) by channel, without B where none was given."""
        values = states if self.batched else states[0]
        parts = {name: values[..., index, :, :] for index, name in enumerate(self.spec.state_channels)}
        if isinstance(next(iter(self.given.values())), Tensor):
            return parts
        return {name: part.cpu().numpy() for name, part in parts.items()}

    def _dataset(self, arrays: Mapping[str, np.ndarray], axes: tuple[str, ...], time: Mapping[str, Any]) -> Fields:
        dims = (*_batch_dims(self.given, self.spec), *axes, "x", "y")
        kept = {name: one for name, one in self.given.coords.items() if name != "time" and set(one.dims) <= set(dims)}
        variables = {name: (dims, array, self.given[name].attrs) for name, array in arrays.items()}
        return type(self.given)(variables, {**kept, **time}, self.given.attrs)

    def _times(self, steps: np.ndarray) -> Any:
        """Return the times of these steps, () or (T,), as a variable with the units and calendar of the given times.

        They begin at 0 where the given states have no time, or each has its own; they are the steps where a step's time
        is not known. Dates become numbers in the units that they were read in, and dates again.
        """
        import xarray  # here, since it is optional; the fields are of it

        dims = ("time",) * steps.ndim
        time = self.given.coords.get("time")
        if self.spec.dt is None:
            return xarray.Variable(dims, steps)
        if time is None or (time.ndim and (self.frames.shape[1] == 1 or time.dims != ("time",))):
            return xarray.Variable(dims, steps * self.spec.dt)
        last = time.variable if not time.ndim else time.variable[-1]
        dated = last.dtype.kind not in "iuf"
        if dated and "units" not in last.encoding:  # no numbers that a step could be added to
            return xarray.Variable(dims, steps * self.spec.dt)
        number = xarray.conventions.encode_cf_variable(last, name="time") if dated else last
        made = xarray.Variable(dims, float(number.values) + steps * self.spec.dt, number.attrs)
        return xarray.conventions.decode_cf_variable("time", made) if dated else made


def given_fields(
    fields: Fields,
    spec: DatasetSpec,
    dt: float | None = None,
    context: int = 1,
    spacing: tuple[float, float] | None = None,
    scalars: Scalars | None = None,
) -> GivenFields:
    """Check fields against the dataset's specification, and stack them for a model of `context` input frames.

    `scalars` are the numbers that condition the model; `dt` is one of them, unless they name it. ValueError for missing
    or unknown channels, unknown scalars, another number of frames, shapes that do not fit together, and values that are
    not finite; FieldsWarning if the grid, `dt`, `spacing` (by default that of a Dataset's axes x and y), a scalar or
    probably the units differ from the training data.
    """
    names = spec.channels
    if not (_is_xarray(fields) or isinstance(fields, Mapping)):
        raise ValueError(
            f"dataset {spec.name}: expected a dictionary of arrays or an xarray Dataset with the channels "
            f"{', '.join(names)}, got {type(fields).__name__}"
        )
    found = list(map(str, fields.data_vars if _is_xarray(fields) else fields))
    if set(found) != set(names):
        missing = [name for name in names if name not in found]
        unknown = [name for name in found if name not in names]
        raise ValueError(
            f"dataset {spec.name}: expected the channels {', '.join(names)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    arrays = {name: _array(fields, name, spec, context) for name in names}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    shape = shapes[spec.state_channels[0]]
    time = () if context == 1 else (context,)
    batch = shape[: -2 - len(time)]
    alike = all(shapes[name] == shape for name in spec.state_channels) and len(shape) == len(batch) + len(time) + 2
    fits = alike and len(batch) <= 1 and shape[len(batch) : -2] == time
    if not (fits and all(shapes[name] in ((*batch, *shape[-2:]), shape[-2:]) for name in spec.constant_channels)):
        listed = ", ".join(f"{name} {shapes[name]}" for name in names)
        if context == 1:
            expected = "channels (H, W), or all state channels (B, H, W)"
        else:
            expected = f"the last {context} frames ({context}, H, W) or (B, {context}, H, W) of all state channels"
        raise ValueError(f"dataset {spec.name}: expected {expected}, on one grid, got {listed}")
    size = batch[0] if batch else 1
    state = torch.stack([arrays[name] for name in spec.state_channels], dim=-3)  # ([B,] [n,] C, H, W)
    frames = state.reshape(size, context, *state.shape[-3:])
    rows = [arrays[name].expand(size, *shape[-2:]) for name in spec.constant_channels]
    constants = torch.stack(rows, dim=1) if rows else state.new_zeros(size, 0, *shape[-2:])
    numbers = _given_scalars(spec, scalars or {}, dt, batch)
    doubts = [*_differences(spec, arrays, dt, spacing or _spacing(fields)), *_scalar_doubts(spec, numbers)]
    for text in doubts:
        warnings.warn(text, FieldsWarning, stacklevel=3)
    return GivenFields(spec, frames, constants, bool(batch), fields, numbers)


def _given_scalars(spec: DatasetSpec, scalars: Scalars, dt: float | None, batch: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the scalars as float64, () or (B,), where `batch` is (B,) if states have such an axis; else ()."""
    if unknown := [name for name in scalars if name not in spec.scalars]:
        known = ", ".join(spec.scalars) or "none, since it was trained without model.condition=scalars"
        raise ValueError(
            f"dataset {spec.name}: unknown scalars {', '.join(map(str, unknown))}: its model takes {known}"
        )
    given = dict(scalars)
    if dt is not None and TIME_STEP in spec.scalars:
        given.setdefault(TIME_STEP, dt)
    made = {}
    for name, value in given.items():
        numbers = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all() or numbers.shape not in ((), batch):
            expected = f", or {batch[0]} of them, one per state" if batch else ""
            raise ValueError(f"dataset {spec.name}: scalar {name}: expected a finite number{expected}, got {value}")
        if spec.scalars[name].log and (numbers <= 0).any():
            raise ValueError(f"dataset {spec.name}: scalar {name}: expected a number above 0, got {numbers.min():g}")
        made[name] = torch.from_numpy(numbers.astype(np.float64))
    return made


def _scalar_doubts(spec: DatasetSpec, scalars: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a sentence for scalars outside the training data, and one for those that are not given."""
    for name, values in scalars.items():
        known = spec.scalars[name]
        margin = SAME * max(abs(known.lowest), abs(known.highest))
        outside = values[(values < known.lowest - margin) | (values > known.highest + margin)]
        if outside.numel() and known.std > 0:
            ran = f"in the training data it ran from {known.lowest:g} to {known.highest:g}"
            yield f"dataset {spec.name}: {name} is {outside[0]:g}, {ran}"
        elif outside.numel():
            ran = f"in the training data it was always {known.lowest:g}"
            yield f"dataset {spec.name}: {name} is {outside[0]:g}, {ran}, so the model cannot follow it"
    missing = [name for name, known in spec.scalars.items() if name not in scalars and known.std > 0]
    if missing:
        yield (
            f"dataset {spec.name}: no value of {', '.join(missing)}, which condition the model: it predicts as for the "
            "mean of the training data"
        )


def _array(fields: Fields, name: str, spec: DatasetSpec, context: int) -> Tensor:
    """Return one channel as float32 (..., H, W)."""
    value = fields[name]
    if _is_xarray(fields):
        time = ["time"] if context > 1 and name in spec.state_channels else []
        dims = [*(dim for dim in _batch_dims(fields, spec) if dim in value.dims), *time, "x", "y"]
        if set(value.dims) != set(dims):
            hint = f"choose them with .isel(time=slice(0, {context}))" if time else "choose a time with .isel(time=0)"
            raise ValueError(
                f"dataset {spec.name}: {name}: expected the dimensions {', '.join([*time, 'x and y'])} and at most one "
                f"more, got {', '.join(map(str, value.dims))}; {hint}"
            )
        value = value.transpose(*dims).values
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, np.float32))
    tensor = tensor.detach().float()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"dataset {spec.name}: {name}: expected finite numbers, got NaN or infinity")
    return tensor


def _batch_dims(fields: Fields, spec: DatasetSpec) -> tuple[str, ...]:
    """Return the dimension of an xarray Dataset that counts states, if there is one."""
    others = {dim for name in spec.state_channels for dim in fields[name].dims} - {"x", "y", "time"}
    return tuple(others) if len(others) == 1 else ()


def _is_xarray(fields: Fields) -> bool:
    """Tell without importing xarray, which is an optional package."""
    return type(fields).__module__.partition(".")[0] == "xarray"


def _spacing(fields: Fields) -> tuple[float, float] | None:
    """Return the mean step from a grid point to the next along x and y of a Dataset that has such axes."""
    axes = [fields.coords[axis].values for axis in "xy" if axis in fields.coords] if _is_xarray(fields) else []
    if len(axes) < 2 or any(axis.ndim != 1 or axis.dtype.kind not in "iuf" or len(axis) < 2 for axis in axes):
        return None
    x, y = (float(axis[-1] - axis[0]) / (len(axis) - 1) for axis in axes)
    return x, y


def _differences(
    spec: DatasetSpec, arrays: Mapping[str, Tensor], dt: float | None, spacing: tuple[float, float] | None
) -> Iterator[str]:
    """Yield a sentence for each property of the fields that is far from the training data."""
    grid = tuple(arrays[spec.state_channels[0]].shape[-2:])
    if spec.grid is not None and grid != spec.grid:
        yield (
            f"dataset {spec.name}: a grid of {grid[0]} x {grid[1]}, the model was trained on "
            f"{spec.grid[0]} x {spec.grid[1]}: a step may be wrong at another resolution"
        )
    for axis, own, known in zip("xy", spacing or (), spec.spacing or (), strict=False):
        if own * known < 0:
            way = ("backward", "forward") if own < 0 else ("forward", "backward")
            yield (
                f"dataset {spec.name}: {axis} runs {way[0]}, in the training data it ran {way[1]}: flip {axis} of all "
                f"fields, and the sign of {axis} components"
            )
        elif grid == spec.grid and abs(own - known) > SPACING_TOLERANCE * abs(known):
            yield f"dataset {spec.name}: points {own:.4g} apart along {axis}, in the training data {known:.4g}"
    if dt is not None and spec.dt is not None and abs(dt - spec.dt) > DT_TOLERANCE * abs(spec.dt):
        yield f"dataset {spec.name}: frames {dt:g} apart, but a step of the model is {spec.dt:g} of time"
    for name, array in arrays.items():
        mean, std = (float(spec.moment(key, [name])) for key in ("mean", "std"))
        center, spread = float(array.double().mean()), float(array.double().std())
        far = abs(center - mean) > FAR * std or spread > FAR * std or 0 < spread < FLAT * std
        if std > 0 and far:
            yield (
                f"dataset {spec.name}: {name} is {center:.3g} ± {spread:.3g}, in the training data it was {mean:.3g} ± "
                f"{std:.3g}: is it in the same units?"
            )

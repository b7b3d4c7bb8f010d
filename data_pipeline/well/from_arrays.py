"""`write_well`: numpy or xarray arrays as a dataset in the Well's layout.

Array legend: N trajectories, T frames, X Y grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.well.dataset import (
    FRACTIONS,
    Trajectories,
    axis_of,
    divide,
    make_field,
    parse_boundary,
    seconds,
    whole_folder,
    write_dataset,
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

    Raises UserError (of data_pipeline.errors) for arrays that do not fit together and for values that are not finite.
    """
    read, points, units = _arrays(fields, {"t": t, "x": x, "y": y}, units or {})
    constant = {key: np.ma.asanyarray(values) for key, values in (constants or {}).items()}
    source = _trajectories(read, constant, points, boundary, scalars or {}, units)
    chosen = split if isinstance(split, Mapping) else divide(len(source.times), split, seed)
    with whole_folder(Path(folder), name) as target:
        write_dataset(target, name, source, chosen)
    return Path(folder) / name


def _arrays(
    fields: Mapping[str, Any], given: Mapping[str, Any], units: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, np.ndarray], Mapping[str, str]]:
    """Return the fields by name, the points along t, x, y, and the units, as given or as an xarray Dataset has them."""
    if hasattr(fields, "data_vars"):
        read, coordinates, found = _from_xarray(fields)
        given = {axis: coordinates.get(axis) if own is None else own for axis, own in given.items()}
        units = {**found, **units}
    else:
        read = {key: _turned(key, values) if hasattr(values, "coords") else values for key, values in fields.items()}
    if not read:
        raise UserError("expected at least one field, got none")
    if missing := [axis for axis, own in given.items() if own is None]:
        raise UserError(f"expected the times t and the grid points x and y, got no {missing[0]}; pass it")
    x, y = (np.asarray(given[axis], np.float64) for axis in ("x", "y"))
    return read, {"t": seconds(np.asarray(given["t"])), "x": x, "y": y}, units


def _trajectories(
    read: Mapping[str, Any],
    constant: Mapping[str, np.ndarray],
    points: Mapping[str, np.ndarray],
    boundary: Mapping[str, str | Sequence[str]],
    scalars: Mapping[str, Any],
    units: Mapping[str, str],
) -> Trajectories:
    """Return what `write_dataset` reads frame by frame. UserError for arrays that do not fit together."""
    times, grid = points["t"], (points["x"].size, points["y"].size)
    count, num_frames = int(next(iter(read.values())).shape[0]), times.shape[-1]
    for key, values in read.items():
        _check_shape(key, values, (count, num_frames, *grid), "(trajectory, time, x, y)", (4, 5, 6))
    for key, values in constant.items():
        _check_shape(key, values, (count, *grid)[3 - values.ndim :], "(x, y) or (trajectory, x, y)", (2, 3))
    if times.shape not in ((num_frames,), (count, num_frames)):
        raise UserError(f"t: expected the shape (T,) or ({count}, T), got {times.shape}")
    for key in units:
        if key not in read and key not in constant:
            raise UserError(f"units: expected names of fields ({', '.join([*read, *constant])}), got {key!r}")
    state = sorted((make_field(key, values.ndim - 4) for key, values in read.items()), key=lambda one: one.order)

    def frames(index: int) -> Iterator[np.ndarray]:
        for number in range(num_frames):
            parts = [_plain(read[one.name][index, number], one.name) for one in state]
            yield np.concatenate([_channels_first(part) for part in parts])

    def constants_of(index: int) -> np.ndarray:
        parts = [_plain(values if values.ndim == 2 else values[index], key) for key, values in constant.items()]
        return np.stack(parts) if parts else np.empty((0, *grid))

    return Trajectories(
        fields=(*state, *(make_field(key, 0, "constant") for key in constant)),
        times=list(np.broadcast_to(times, (count, num_frames))),
        x=points["x"],
        y=points["y"],
        boundary=parse_boundary(boundary),
        frames=frames,
        constants=constants_of,
        scalars={key: _per_trajectory(key, one, count) for key, one in scalars.items()},
        attributes={key: {"units": unit} for key, unit in units.items()},
    )


def _from_xarray(given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return an xarray Dataset's variables in the order n, t, x, y, its coordinates by axis, and its units."""
    read = {str(key): _turned(str(key), values) for key, values in given.data_vars.items()}
    points = {axis: given[dim].values for dim in given.coords if (axis := axis_of(str(dim))) and given[dim].ndim == 1}
    return read, points, {key: str(values.attrs["units"]) for key, values in read.items() if "units" in values.attrs}


def _turned(name: str, values: Any) -> Any:
    """Return an xarray DataArray in the order n, t, x, y, told by the names of its dimensions."""
    dims = {axis_of(str(dim)): dim for dim in values.dims}
    if not {"t", "x", "y"} <= dims.keys() <= {"n", "t", "x", "y"} or len(dims) < len(values.dims):
        raise UserError(
            f"{name}: expected the dimensions time, x, y, and maybe one that counts trajectories (sample), got "
            f"{', '.join(map(str, values.dims))}; rename them, or pass what does not change in time as constants or "
            "scalars"
        )
    full = values if "n" in dims else values.expand_dims("trajectory")
    return full.transpose(dims.get("n", "trajectory"), dims["t"], dims["x"], dims["y"])


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

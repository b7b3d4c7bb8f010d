"""The axes of the arrays: which is which, where the grid points are, and what the values show about the boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.importer import options as said
from data_pipeline.importer.arrays import Array
from data_pipeline.importer.layouts import Dims, Layout
from data_pipeline.importer.options import Options
from data_pipeline.well.dataset import axis_of, check_points

MAX_COMPONENTS = 8  # an axis of more points is not guessed to be one of components
Needs = dict[str, tuple["str | tuple[str, ...]", str]]  # option -> (value to type, why); what is not known


@dataclass(frozen=True)
class Side:
    """One axis of the grid."""

    points: np.ndarray
    reverse: bool  # the files hold it from the upper to the lower end
    stored: int  # points in the files; those beyond len(points) are left out
    origin: str  # where the points come from


def resolve_dims(options: Options, layout: Layout, arrays: Mapping[str, Array], needs: Needs) -> dict[str, Dims]:
    """Return the axes of the arrays: what the file or its layout tells, what the user says, or a needed guess."""
    known = dict(layout.dims)
    sizes = _sizes(layout, arrays)
    least = 3 if options.dims is None else 2  # over x and y alone is what does not change in time
    candidates = [
        key for key, array in arrays.items() if len(array.shape) >= least and key not in layout.coordinates.values()
    ]
    if not candidates and not known:
        shapes = ", ".join(f"{key} {array.shape}" for key, array in list(arrays.items())[:8])
        raise UserError(
            f"{options.files[0]}: expected arrays over time, x and y, got {shapes or 'no array of numbers'}"
        )
    if options.dims is not None:
        stated = said.dims(options.dims)
        for key in candidates:
            fitting = _fit(stated, len(arrays[key].shape))
            named = arrays[key].dims is not None and known.get(key)
            if named and fitting and named != fitting:
                raise UserError(
                    f"--dims {options.dims}: {key} names its own axes {', '.join(arrays[key].dims or ())}, so they are "
                    f"{','.join(named)}; leave --dims out"
                )
            if fitting:
                known[key] = fitting
        if not any(known.get(key) == stated for key in candidates):
            found = "; ".join(f"{key} has {len(arrays[key].shape)}: {arrays[key].shape}" for key in candidates)
            raise UserError(f"--dims {options.dims}: it names {len(stated)} axes, and {found}")
    for key, axes in known.items():
        for axis, size in zip(axes, arrays[key].shape, strict=False) if key in arrays else ():
            if axis in sizes and size not in (sizes[axis], sizes[axis] - (axis == "t")):
                raise UserError(_mismatch(key, arrays[key].shape, axes, axis, sizes))
    if known or options.dims is not None:
        return known
    for key in candidates:
        known[key] = _guess(arrays[key], sizes)
    best = max(known.values(), key=len)
    guess = ",".join(best)
    key = next(key for key in known if known[key] == best)
    if len(_orders(arrays[key].shape, best, sizes)) == 1 and {"t", "x", "y"} <= set(sizes) and set(best) == set("txy"):
        return known  # the lengths of t, x and y are all different, and leave one order only
    strange = [name for name in arrays[key].dims or () if axis_of(name) is None]
    what = f"what is {', '.join(strange)} of {key}?" if strange else f"the axes of {key} have no names in the file"
    needs["dims"] = guess, f"{what} {arrays[key].shape}; check x against y"
    return known


def _sizes(layout: Layout, arrays: Mapping[str, Array]) -> dict[str, int]:
    return {
        axis: arrays[key].shape[-1]
        for axis, key in layout.coordinates.items()
        if axis in "txy" and key in arrays and arrays[key].shape
    }


def _fit(stated: Dims, ndim: int) -> Dims | None:
    """Return the axes of an array of `ndim` axes: those stated, or without components, time or trajectories."""
    for gone in ("", "c", "t", "n", "tc", "nt", "nc", "ntc"):
        left = tuple(axis for axis in stated if axis not in gone)
        if len(left) == ndim:
            return left
    return None


def _orders(shape: tuple[int, ...], axes: Dims, sizes: Mapping[str, int]) -> list[Dims]:
    """Return the orders of `axes` that agree with the known numbers of points."""
    return [
        order
        for order in permutations(axes)
        if all(sizes.get(axis, size) == size for axis, size in zip(order, shape, strict=True))
    ]


def _guess(array: Array, sizes: Mapping[str, int]) -> Dims:
    shape, named = array.shape, [axis_of(name) for name in array.dims or ()]
    if named.count(None) == 1 and "n" not in named:
        return tuple(axis or "n" for axis in named)
    small = shape[-1] <= MAX_COMPONENTS < min(shape[-3:-1])
    usual = {3: "txy", 4: "txyc" if small else "ntxy", 5: "ntxyc" if small else "ntcxy"}.get(len(shape), "ntcxyz")
    axes = tuple(usual[: len(shape)])
    return axes if axes in (found := _orders(shape, axes, sizes)) or not found else found[0]


def _mismatch(key: str, shape: tuple[int, ...], axes: Dims, axis: str, sizes: Mapping[str, int]) -> str:
    fitting = [",".join(order) for order in _orders(shape, axes, sizes)]
    way_out = (
        f"it agrees with --dims {' or '.join(fitting[:3])}" if fitting else "no order of these axes agrees with it"
    )
    return (
        f"{key} {shape}: read as {','.join(axes)} it has {shape[axes.index(axis)]} points along {axis}, and the file "
        f"has {sizes[axis]} of them ({', '.join(f'{name} {size}' for name, size in sizes.items())}); {way_out}"
    )


def find_side(
    axis: str, stored: int, options: Options, layout: Layout, arrays: Mapping[str, Array], needs: Needs, where: str
) -> Side:
    """Return the points of an axis that has `stored` of them in the file `where`."""
    if stored < 2:
        raise UserError(f"{where}: {axis} has {stored} point; the models of this project read 2D fields, not 1D ones")
    count = stored
    if stored % 2:
        count -= 1
        if options.crop != "even":
            needs["crop"] = "even", f"{axis} has {stored} points, and the model's transform needs an even number"
    key = layout.coordinates.get(axis, "")
    stated = said.extent(options.extent).get(axis)
    if stated is None and key in arrays:
        points = np.asarray(arrays[key].whole(), np.float64)
        if points.ndim == 2 and (points == points[:1]).all():  # one row for each trajectory
            points = points[0]
        reverse = points.ndim == 1 and len(points) > 1 and points[0] > points[-1]
        points = points[::-1] if reverse else points
        if points.ndim != 1 or len(points) != stored:
            raise UserError(
                f"{where}: {key}: expected {stored} points of {axis}, the same for all trajectories, got an "
                f"array {arrays[key].shape}; state the domain with --extent"
            )
        check_points(points, f"{where}: {key}")
        return Side(points[:count], bool(reverse), stored, f"{key} in the file")
    low, high = stated or layout.domain.get(axis, (0.0, float(stored)))
    if stated is None and axis not in layout.domain:
        needs["extent"] = "", "the file has no grid points; this is a length of 1 for each of them"
    kinds = said.boundary(options.boundary).get(axis, (layout.boundary.get(axis, ""),))
    shift = 0.0 if stated and kinds[0] == "periodic" else 0.5  # periodic codes count points from the lower end
    points = low + (np.arange(stored) + shift) * (high - low) / stored
    origin = f"{'--extent' if stated else 'domain in the file'} {low:g} to {high:g}"
    return Side(points[:count], False, stored, origin)


def need_boundary(frame: np.ndarray, known: Mapping[str, Sequence[str]], needs: Needs) -> None:
    """Note which boundary types are missing. `frame` (X, Y) shows whether an axis may be periodic."""
    missing = [axis for axis in "xy" if axis not in known]
    if not missing:
        return
    values, reasons = [], []
    for number, axis in enumerate("xy"):
        if axis in known:
            values.append(f"{axis}={':'.join(dict.fromkeys(known[axis]))}")
            continue
        steps = np.abs(np.diff(frame, axis=number)).mean(axis=1 - number)  # between neighbors, line by line
        across = np.abs(frame.take(0, number) - frame.take(-1, number)).mean()
        periodic = bool(across <= 1.25 * steps.max())
        values.append(f"{axis}={'periodic' if periodic else 'wall'}")
        fit = "differ no more than neighbors do" if periodic else "do not fit together (it may be open, too)"
        reasons.append(f"the two ends of {axis} {fit}")
    needs["boundary"] = ",".join(values), f"not in the file; {', '.join(reasons)}"

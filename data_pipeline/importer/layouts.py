"""How known programs lay out their files: found by looking at the file, and named in what the command prints.

A layout says which groups of a file hold runs, what the axes of each array are (n trajectories, t time, c components,
x, y, z), where times and grid points are, and what the file tells about fields, boundaries and parameters.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import h5py
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.importer.arrays import Array, ArrayFile, reading
from data_pipeline.well.dataset import axis_of
from data_pipeline.well.hdf5 import SPLITS
from data_pipeline.well.layout import boundary_masks, boundary_types, hdf5_errors, plain_group

Dims = tuple[str, ...]
BOOKKEEPING = ("data_length", "field_attributes", "_FillValue", "missing_value", "Conventions", "_NCProperties")


@dataclass(frozen=True)
class Layout:
    """What one file is taken to be. Keys are relative to the groups of the runs."""

    name: str  # of the program, or of the kind of file
    how: str  # one line for the user: what was recognized
    runs: tuple[str, ...]  # prefixes of the keys, one for each group that holds trajectories; ("",) for a whole file
    dims: Mapping[str, Dims]  # key -> its axes, where they are known
    coordinates: Mapping[str, str]  # axis t, x, y -> key; `unused` -> a key that is no field either
    fields: Mapping[str, tuple[str, ...]]  # name -> expressions of its components; as `--map` and `--vector` give them
    boundary: Mapping[str, str] = field(default_factory=dict)  # axis -> type, or types of its ends as wall:open
    domain: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # axis -> (lower, upper end)
    numbers: Mapping[str, float] = field(default_factory=dict)  # attributes that may be parameters of the run
    splits: Mapping[str, str] = field(default_factory=dict)  # run -> its split
    num_frames: int | None = None  # frames that were written, where space was taken for more


def recognize(source: ArrayFile, pattern: str | None = None) -> Layout:
    """Return the layout of an open file. `pattern` is a user's key with a glob (`*/data`), which names the runs.

    UserError for attributes that are not what the program writes.
    """
    with reading(source.path):
        return _recognize(source, pattern)


def _recognize(source: ArrayFile, pattern: str | None) -> Layout:
    if {"dimensions/time", "dimensions/x"} <= source.arrays.keys():
        return _well(source)
    if "field_attributes" in source.attrs and "data" in source.arrays:
        return _pypde(source)
    runs = _runs(source, pattern)
    arrays = run_arrays(source, runs[0])
    coordinates = {axis: key for key in arrays if (axis := axis_of(key.rpartition("/")[2])) and axis in "txyn"}
    names = [key for key in arrays if key not in coordinates.values()]
    per_run = {key: ("n",) for key in names if len(arrays[key].shape) == 1 and key not in ("dt", "dx", "dy")}
    four = {key: tuple("ntxy") for key in names if len(arrays[key].shape) == 4}
    known = {key: axes for key in names if (axes := _named_dims(arrays[key]))}
    made = Layout("arrays", f"{source.kind} arrays whose axes have no names", runs, {}, coordinates, {})
    if set(runs) <= {f"{split}/" for split in SPLITS} and four:
        made = _pdearena(runs, four, per_run, coordinates)
    elif "data" in arrays and runs != ("",) and all(run.rstrip("/").isdecimal() for run in runs):
        shape = arrays["data"].shape
        code, order = ("shallow-water", "txyc") if shape[-1] == 1 else ("reaction-diffusion", "tyxc")
        order = order if "y" in coordinates else "txc"
        how = f"PDEBench: groups <seed>/data with the axes ({', '.join(order)}), as its {code} code writes them"
        data = {"data": tuple(order)} if len(shape) == len(order) else {}
        made = Layout("pdebench", how, runs, data, coordinates, _fields(arrays, data))
    elif "x-coordinate" in arrays:
        axes = ("n", "t", *(axis for axis in "xyz" if f"{axis}-coordinate" in arrays))
        full = {key: axes for key in names if len(arrays[key].shape) == len(axes)}
        how = f"PDEBench: arrays ({', '.join(axes)}) beside x-coordinate, y-coordinate and t-coordinate"
        made = Layout("pdebench", how, runs, full, coordinates, _fields(arrays, full))
    elif known:
        how = f"{source.kind} with named dimensions"
        made = Layout("xarray", how, runs, known, coordinates, _fields(arrays, known))
    return replace(made, numbers=_parameters(source))


def run_arrays(source: ArrayFile, run: str) -> dict[str, Array]:
    """Return the arrays of one run by their keys relative to it."""
    return {key.removeprefix(run): array for key, array in source.arrays.items() if key.startswith(run)}


def _runs(source: ArrayFile, pattern: str | None) -> tuple[str, ...]:
    """Return the groups that hold a run each: those a glob names, or all of the root where they hold the same keys."""
    if pattern is not None:
        parts = pattern.split("/")
        depth = max(place for place, part in enumerate(parts) if any(sign in part for sign in "*?")) + 1
        found = {"/".join(key.split("/")[:depth]) for key in source.arrays if fnmatch.fnmatchcase(key, pattern)}
        if depth == len(parts) or not found:
            keys = ", ".join(list(source.arrays)[:12])
            raise UserError(f"{source.path}: {pattern!r}: expected groups with the same arrays in each, found {keys}")
        return tuple(f"{run}/" for run in sorted(found))
    inside: dict[str, set[str]] = {}
    for key in source.arrays:
        group, _, rest = key.partition("/")
        inside.setdefault(group if rest else "", set()).add(rest)
    same = "" not in inside and len({frozenset(keys) for keys in inside.values()}) == 1
    return tuple(f"{group}/" for group in sorted(inside)) if same else ("",)


def _named_dims(array: Array) -> Dims | None:
    """Return the axes of an array if the names of its dimensions tell all of them."""
    axes = [axis_of(name) for name in array.dims or ()]
    return tuple(axis for axis in axes if axis) if axes and None not in axes else None


def _pdearena(
    runs: tuple[str, ...], four: Mapping[str, Dims], per_run: Mapping[str, Dims], coordinates: Mapping[str, str]
) -> Layout:
    """Return the layout of PDEArena's HDF5 files. Those with the buoyancy buo_y are smoke in a box with walls."""
    made = Layout(
        name="pdearena",
        how="PDEArena: groups train, valid or test of arrays (trajectory, time, x, y)",
        runs=runs,
        dims={**four, **per_run},
        coordinates=coordinates,
        fields=_whole(four),
        splits={run: run.rstrip("/") for run in runs},
    )
    if set(four) != {"u", "vx", "vy"} or "buo_y" not in per_run:
        return made
    # The generator spreads the times of T frames over T - 1 intervals, so `t` is wrong and `dt` is right.
    places = {axis if axis != "t" else "unused": key for axis, key in coordinates.items()}
    return replace(
        made,
        how=f"{made.how}, of smoke that rises in a closed box",
        coordinates=places,
        fields={"smoke": ("u",), "velocity": ("vx", "vy")},
        boundary={"x": "wall", "y": "wall"},
    )


def _fields(arrays: Mapping[str, Array], dims: Mapping[str, Dims]) -> dict[str, tuple[str, ...]]:
    """Return the arrays that are one scalar field: those over x and y without several components."""
    return {
        name: expressions
        for name, expressions in _whole(dims).items()
        if {"x", "y"} <= set(dims[expressions[0]])
        and "z" not in dims[expressions[0]]
        and dict(zip(dims[expressions[0]], arrays[expressions[0]].shape, strict=True)).get("c", 1) == 1
    }


def _whole(dims: Mapping[str, Dims]) -> dict[str, tuple[str, ...]]:
    return {key.rpartition("/")[2]: (key,) for key in dims}


def _parameters(source: ArrayFile) -> dict[str, float]:
    """Return the attributes that are numbers and may describe a run; py-pde writes numbers as texts."""
    found = {}
    for name, value in source.attrs.items():
        try:
            number = float(value)
        except ValueError:
            continue
        if name not in BOOKKEEPING and math.isfinite(number):
            found[name] = number
    return found


def _well(source: ArrayFile) -> Layout:
    """Return the Well's own layout: files that are to be cropped, divided, or converted from another type."""
    fields: dict[str, tuple[str, ...]] = {}
    dims: dict[str, Dims] = {}
    for key, array in source.arrays.items():
        group, _, name = key.partition("/")
        if group == "scalars":
            dims[key] = ("n",)
        if not re.fullmatch("t[0-2]_fields", group):
            continue
        order = int(group[1])
        varies = {axis: array.attrs.get(f"{flag}_varying") == 1 for axis, flag in (("n", "sample"), ("t", "time"))}
        dims[key] = (*(axis for axis in "nt" if varies[axis]), "x", "y", *("c" for _ in range(order)))
        if len(dims[key]) != len(array.shape):
            raise UserError(
                f"{source.path}: {key} {array.shape}: expected the axes {', '.join(dims[key])} from its attributes "
                "sample_varying and time_varying; write what varies along one axis only as a field over both"
            )
        places = [",".join(map(str, place)) for place in np.ndindex(*(2,) * order)]
        fields[name] = tuple(f"{key}[...,{place}]" if place else key for place in places)
    with hdf5_errors(str(source.path)), h5py.File(source.path, "r") as file:
        where = f"{source.path}: boundary_conditions"
        sides = boundary_types(boundary_masks(plain_group(file, "boundary_conditions", where), where))
    return Layout(
        name="well",
        how="The Well's own layout",
        runs=("",),
        dims=dims,
        coordinates={"t": "dimensions/time", "x": "dimensions/x", "y": "dimensions/y"},
        fields=fields,
        boundary={axis: ":".join(ends).lower() for axis, ends in zip("xy", sides, strict=True)},
    )


def _pypde(source: ArrayFile) -> Layout:
    """Return the layout of a file of py-pde's FileStorage: data (T, [components,] X, Y), attributes as JSON."""
    attributes = _unpacked(source.attrs["field_attributes"])
    parts = [_unpacked(part) for part in attributes.get("fields", [attributes])]
    grid = _unpacked(parts[0].get("grid", {}))
    shape = grid.get("shape", [])
    if grid.get("class") not in ("CartesianGrid", "UnitGrid"):
        raise UserError(f"{source.path}: py-pde: expected a CartesianGrid or UnitGrid, got {grid.get('class')!a}")
    inner = source.arrays["data"].shape[1 : -len(shape)]  # () of a scalar, (2,) of a vector, (C,) of a collection
    places = [f"data[:,{','.join(map(str, place))}]" if inner else "data" for place in np.ndindex(*inner)]
    fields = {}
    for number, part in enumerate(parts):
        width = len(shape) ** {"VectorField": 1, "Tensor2Field": 2}.get(str(part.get("class")), 0)
        fields[str(part.get("label") or f"field_{number}")] = tuple(places[:width])
        del places[:width]
    sides = tuple("xyz"[: len(shape)])
    periodic, bounds = grid.get("periodic", False), grid.get("bounds") or [[0, size] for size in shape]
    return Layout(
        name="pypde",
        how="py-pde: each file of its FileStorage holds one run",
        runs=("",),
        dims={"data": ("t", *("c" for _ in inner), *sides)},
        coordinates={"t": "times"} if "times" in source.arrays else {},
        fields=fields,
        boundary={
            axis: "periodic"
            for number, axis in enumerate(sides)
            if (periodic[number] if isinstance(periodic, list) else periodic)
        },
        domain={axis: (float(low), float(high)) for axis, (low, high) in zip(sides, bounds, strict=True)},
        numbers=_parameters(source),
        num_frames=int(float(source.attrs["data_length"])) if "data_length" in source.attrs else None,
    )


def _unpacked(value: Any) -> dict[str, Any]:
    """Return JSON whose members are JSON texts again, as py-pde writes its attributes."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"field_attributes: expected JSON as py-pde writes it, got {value[:80]!a}") from error
    if not isinstance(value, dict):
        return {}
    made = {}
    for key, one in value.items():
        try:
            made[key] = json.loads(one) if isinstance(one, str) else one
        except (ValueError, RecursionError):
            made[key] = one
    return made

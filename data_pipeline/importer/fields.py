"""The fields of an import: which arrays, or parts of them, are the components of which field, and how they are read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.importer import options as said
from data_pipeline.importer.arrays import Array
from data_pipeline.importer.axes import MAX_COMPONENTS, Needs
from data_pipeline.importer.layouts import Dims, Layout
from data_pipeline.importer.options import Expression, Options
from data_pipeline.registry import Field
from data_pipeline.schema import NAME
from data_pipeline.well.dataset import make_field


@dataclass(frozen=True)
class Part:
    """One component of a field in the files."""

    key: str  # of the array, relative to the group of its run
    dims: Dims  # the array's axes
    fixed: tuple[int | None, ...]  # the number of each axis that is not read as a whole
    part: str  # "real" or "imag" of complex numbers, or ""

    def __str__(self) -> str:
        axes = ",".join(axis if one is None else str(one) for axis, one in zip(self.dims, self.fixed, strict=True))
        return f"{self.key}[{axes}]{f'.{self.part}' if self.part else ''}"

    @property
    def free(self) -> Dims:
        """Return the axes that are read as a whole."""
        return tuple(axis for axis, one in zip(self.dims, self.fixed, strict=True) if one is None)


@dataclass(frozen=True)
class Planned:
    """A field of the dataset, and where its components are."""

    field: Field
    parts: tuple[Part, ...]
    attributes: Mapping[str, str]  # units, long_name


def without_runs(named: Mapping[str, tuple[Expression, ...]], layout: Layout) -> dict[str, tuple[Expression, ...]]:
    """Return the expressions with keys relative to the groups of the runs: data for 0000/data and for */data."""
    depth = layout.runs[0].count("/")
    made: dict[str, tuple[Expression, ...]] = {}
    for name, expressions in named.items():
        (one,) = expressions
        parts = one.key.split("/")
        inside = one.key.startswith(layout.runs[0]) or any(sign in one.key for sign in "*?")
        made[name] = (Expression("/".join(parts[depth:]), one.index, one.part),) if depth and inside else (one,)
    return made


def find_components(
    named: Mapping[str, tuple[Expression, ...]],
    groups: Mapping[str, tuple[str, ...]],
    layout: Layout,
    arrays: Mapping[str, Array],
    dims: Mapping[str, Dims],
    needs: Needs,
) -> dict[str, tuple[Expression, ...]]:
    """Return field -> its components: what the user names, else what the layout tells, else every array that is one."""
    known = dict(named) or {name: tuple(map(said.expression, texts)) for name, texts in layout.fields.items()}
    for key, axes in dims.items() if not known else ():
        count = dict(zip(axes, arrays[key].shape, strict=True)).get("c", 1)
        if not {"t", "x", "y"} <= set(axes):
            continue
        name = key.rpartition("/")[2]
        if count == 1:
            known[name] = (Expression(key),)
        else:
            place = ("...", *(None for _ in axes[axes.index("c") + 1 :]))
            chosen = [Expression(key, (*place[:1], number, *place[1:])) for number in range(min(count, MAX_COMPONENTS))]
            known |= {f"{name}_{number}": (one,) for number, one in enumerate(chosen)}
            maps = tuple(f"{one}={name}_{number}" for number, one in enumerate(chosen))
            needs["map"] = (
                maps,
                f"{key} has {count} components; give them names, or use --vector NAME={key} for a vector",
            )
    for name, components in groups.items():
        if len(components) == 1:
            (key,) = components
            axes = dims.get(key, ())
            if "c" not in axes or arrays[key].shape[axes.index("c")] != 2:
                raise UserError(
                    f"--vector {name}={key}: expected an array with an axis c of 2 components, or two fields"
                )
            before = (None,) * axes.index("c")
            made = tuple(Expression(key, (*before, number)) for number in range(2))
            known = {one: parts for one, parts in known.items() if not any(part.key == key for part in parts)}
            needs.pop("map", None)
        else:
            if missing := [one for one in components if one not in known and one not in arrays]:
                raise UserError(f"--vector {name}: expected two of {', '.join({**known, **arrays})}, got {missing[0]}")
            made = tuple(known.pop(one)[0] if one in known else Expression(one) for one in components)
        known[name] = made
    return known


def find_fields(
    known: Mapping[str, tuple[Expression, ...]],
    options: Options,
    arrays: Mapping[str, Array],
    dims: Mapping[str, Dims],
    notes: list[str],
) -> tuple[Planned, ...]:
    """Return the fields in the order of the Well: state, then constant, each by tensor order."""
    units = said.pairs(options.units, "--units", "FIELD=UNIT,FIELD=UNIT") if options.units else {}
    made = []
    for name, expressions in known.items():
        parts = tuple(_part(one, arrays, dims) for one in expressions)
        plain = plain_name(name)
        if plain != name:
            notes.append(f"{name!r} becomes {plain}: names have letters, digits and underscores")
        roles = {"state" if "t" in part.free else "constant" for part in parts}
        if len(roles) > 1 or len(parts) not in (1, 2, 4):
            raise UserError(
                f"{name}: expected 1, 2 or 4 components, all over time or none, got {', '.join(map(str, parts))}"
            )
        attrs = [arrays[part.key].attrs for part in parts]
        found = {str(one.get("units") or one.get("unit") or "") for one in attrs}
        unit = units.pop(name, units.pop(plain, found.pop() if len(found) == 1 else ""))
        long_name = str(attrs[0].get("long_name") or attrs[0].get("description") or (name if plain != name else ""))
        texts = {"units": unit, "long_name": long_name if len(parts) == 1 else ""}
        field = make_field(plain, {1: 0, 2: 1, 4: 2}[len(parts)], roles.pop())
        made.append(Planned(field, parts, {key: text for key, text in texts.items() if text}))
    if units:
        raise UserError(f"--units: expected names of fields ({', '.join(known)}), got {next(iter(units))!r}")
    made.sort(key=lambda one: (one.field.role == "constant", one.field.order))
    if not made or made[0].field.role != "state":
        seen = "; ".join(f"{key} {arrays[key].shape} is {','.join(axes)}" for key, axes in dims.items())
        raise UserError(
            f"{options.files[0]}: expected fields over time, x and y, got {seen or 'none'}. The models of this project "
            "read 2D fields, not 1D ones; of 3D data, take a plane with --map 'KEY[...,0]=NAME'. --dims names the axes"
        )
    kinds = sorted({str(arrays[part.key].dtype) for one in made for part in one.parts} - {"float32"})
    notes += [f"{kind} becomes float32" for kind in kinds]
    for pair in (("u", "v"), ("vx", "vy"), ("ux", "uy"), ("velocity_x", "velocity_y")):
        if set(pair) <= {one.field.name for one in made if not one.field.order}:
            notes.append(
                f"if {pair[0]} and {pair[1]} are the components of a vector, add --vector velocity={','.join(pair)}"
            )
    return tuple(made)


def _part(one: Expression, arrays: Mapping[str, Array], dims: Mapping[str, Dims]) -> Part:
    if one.key not in arrays:
        raise UserError(f"--map {one}: expected an array of the file ({', '.join(list(arrays)[:12])}), got {one.key}")
    array, axes = arrays[one.key], dims.get(one.key)
    if axes is None:
        raise UserError(
            f"{one.key} {array.shape}: its axes are not known; --dims names the axes of arrays of another shape"
        )
    if 0 in array.shape:
        raise UserError(f"{one.key} {array.shape}: expected at least one trajectory, frame and point, got none")
    fixed = list(one.numbers(len(axes)))
    for place, (axis, size, number) in enumerate(zip(axes, array.shape, fixed, strict=True)):
        if number is not None and not -size <= number < size:
            raise UserError(f"--map {one}: expected a number below {size}, the points of {axis}, got {number}")
        if axis == "c" and number is None:
            if size != 1:
                index = ",".join("0" if axis == "c" else ":" for axis in axes)
                raise UserError(
                    f"{one.key} {array.shape}: choose one of its {size} components, as in "
                    f"--map '{one.key}[{index}]=NAME', or take two as --vector NAME={one.key}"
                )
            fixed[place] = 0
    part = Part(one.key, axes, tuple(fixed), one.part)
    if "z" in part.free:
        raise UserError(
            f"{one.key} {array.shape} is 3D ({','.join(axes)}), and the models of this project read 2D fields. Take a "
            f"plane of it, as in --dims {','.join(axes)} --map '{one.key}[...,0]=NAME'"
        )
    if not {"x", "y"} <= set(part.free):
        raise UserError(
            f"{one.key} {array.shape}: expected a field over x and y, got the axes {','.join(part.free)}; models of "
            "this project read 2D fields, not 1D ones"
        )
    if array.dtype.kind == "c" and not part.part:
        raise UserError(
            f"{one.key}: it holds complex numbers, and a field is real; take both parts: --map '{one}.real=NAME_re' "
            f"--map '{one}.imag=NAME_im'"
        )
    if array.dtype.kind in "mM":
        raise UserError(f"{one.key}: it holds times, not a field")
    return part


def plain_name(name: str) -> str:
    """Return a name of letters, digits and underscores for any text; Greek letters are spelled out."""
    spelled = []
    for sign in unicodedata.normalize("NFKD", name):
        known = unicodedata.name(sign, "")
        greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (FINAL )?(\w+)", known)
        spelled.append(greek[3].lower() if greek else sign if sign.isascii() else "")
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", "".join(spelled)).strip("_")[:64]
    plain = plain if not plain[:1].isdecimal() else f"f_{plain}"[:64]
    if not NAME.fullmatch(plain):
        raise UserError(f"{name!a}: expected a name with letters; give one with --map KEY=NAME")
    return plain


def read_frames(array: Array, part: Part, index: int | None, start: int, stop: int) -> np.ndarray:
    """Return frames (T, X, Y) of a component; one frame of a constant one."""
    free = {"n": index, "t": slice(start, stop)}
    chosen = tuple(
        free.get(axis, slice(None)) if number is None else number
        for axis, number in zip(part.dims, part.fixed, strict=True)
    )
    values = array.fetch(chosen)
    fill = array.attrs.get("_FillValue", array.attrs.get("missing_value"))  # xarray has made NaN of it, h5py has not
    if isinstance(fill, float) and values.dtype.kind in "iuf":
        values = np.where(values == (values.dtype.type(fill) if values.dtype.kind == "f" else fill), np.nan, values)
    values = getattr(values, part.part) if part.part else values
    left = [axis for axis in part.free if axis != "n"]
    order = [left.index(axis) for axis in "txy" if axis in left]
    return values.transpose(order).reshape(-1, *(values.shape[left.index(axis)] for axis in "xy"))

"""What a user says about the files: the options of `data-pipeline import`, read into plain values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.well.dataset import axis_of

_EXPRESSION = re.compile(r"(?P<key>[^\[\]]+?)(\[(?P<index>[^\[\]]*)\])?(\.(?P<part>real|imag))?")


@dataclass(frozen=True)
class Options:
    """The options as they were typed; None or () where they were not."""

    files: tuple[str, ...]
    name: str
    out: Path
    map: tuple[str, ...] = ()
    vector: tuple[str, ...] = ()
    dims: str | None = None
    boundary: str | None = None
    dt: float | None = None
    extent: str | None = None
    scalars: tuple[str, ...] = ()
    units: str | None = None
    split: str | None = None
    seed: int = 0
    crop: str | None = None
    leave_out: str | None = None
    share: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for one in ("files", "map", "vector", "scalars", "share"):
            object.__setattr__(self, one, tuple(getattr(self, one) or ()))
        if self.dt is not None and not 0 < self.dt < float("inf"):
            raise UserError(f"--dt: expected a number above 0, got {self.dt}")

    def command(self, **more: str | tuple[str, ...]) -> str:
        """Return the command to type: these options and `more`, by name."""
        words = ["data-pipeline", "import", *self.files]
        for one in fields(self)[1:]:
            value = more.get(one.name, getattr(self, one.name))
            for item in value if isinstance(value, tuple | list) else (value,):
                if item is not None and item != one.default:
                    words += [f"--{one.name.replace('_', '-')}", str(item)]
        return shlex.join(words)


@dataclass(frozen=True)
class Expression:
    """One component of a field: KEY, KEY[...,0] or KEY.real."""

    key: str
    index: tuple[int | str | None, ...] = ()  # a number, None for all of an axis, or "..."
    part: str = ""  # "real" or "imag" of complex numbers

    def __str__(self) -> str:
        items = [":" if one is None else str(one) for one in self.index]
        return f"{self.key}{f'[{chr(44).join(items)}]' if items else ''}{f'.{self.part}' if self.part else ''}"

    def numbers(self, ndim: int) -> tuple[int | None, ...]:
        """Return the fixed number of each of `ndim` axes, or None. UserError for another number of axes."""
        items: list[int | str | None] = list(self.index)
        if "..." in items:
            place = items.index("...")
            items[place : place + 1] = [None] * max(0, ndim - len(items) + 1)
        items += [None] * (ndim - len(items))
        if len(items) != ndim:
            raise UserError(f"--map {self}: expected at most {ndim} indices, the axes of {self.key}")
        return tuple(one if isinstance(one, int) else None for one in items)


def expression(text: str) -> Expression:
    """Return the parts of KEY[...,0] or KEY.real. UserError for anything else."""
    found = _EXPRESSION.fullmatch(text.strip())
    if found is None:
        raise UserError(f"--map {text!r}: expected KEY, or KEY[...,0] for one component of it, or KEY.real, KEY.imag")
    index: list[int | str | None] = []
    for item in (found["index"] or "").split(",") if found["index"] else ():
        plain = item.strip()
        if plain not in ("...", ":") and not re.fullmatch(r"-?\d{1,6}", plain):
            raise UserError(f"--map {text!r}: expected numbers, `:` and `...` in the brackets, got {plain!r}")
        index.append(plain if plain == "..." else None if plain == ":" else int(plain))
    if index.count("...") > 1:
        raise UserError(f"--map {text!r}: expected `...` once")
    return Expression(found["key"], tuple(index), found["part"] or "")


def pairs(text: str, option: str, form: str) -> dict[str, str]:
    """Return KEY=VALUE,KEY=VALUE as a mapping. UserError, with the form, for anything else."""
    made = {}
    for item in text.split(","):
        key, equals, value = item.rpartition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"{option} {text!r}: expected {form}")
        made[key.strip()] = value.strip()
    return made


def maps(options: Options) -> dict[str, tuple[Expression, ...]]:
    """Return field -> its components, from --map and --vector. Names in --vector are fields of --map, or keys."""
    made: dict[str, tuple[Expression, ...]] = {}
    for text in options.map:
        key, equals, name = text.rpartition("=")
        if not equals or not key or not name:
            raise UserError(f"--map {text!r}: expected KEY=NAME, as in --map 'data[...,0]=activator'")
        if name in made:
            raise UserError(f"--map {text!r}: the name {name} is given twice")
        made[name.strip()] = (expression(key),)
    return made


def vectors(options: Options) -> dict[str, tuple[str, ...]]:
    """Return vector -> the names of its two components, or of the one array that holds both."""
    made = {}
    for text in options.vector:
        name, _, parts = text.partition("=")
        names = tuple(part.strip() for part in parts.split(",") if part.strip())
        if not name or len(names) not in (1, 2):
            raise UserError(f"--vector {text!r}: expected NAME=X,Y, as in --vector velocity=u,v")
        made[name.strip()] = names
    return made


def dims(text: str) -> tuple[str, ...]:
    """Return the axes of --dims as letters. UserError for what is no axis, and for data that are not 2D."""
    axes = [axis_of(word.strip()) or word.strip() for word in text.split(",")]
    if unknown := [axis for axis in axes if axis not in "ntcxyz" or not axis]:
        raise UserError(
            f"--dims {text!r}: expected n (trajectories), t (time), x, y and maybe c (components), got {unknown[0]!r}"
        )
    if len(set(axes)) < len(axes):
        raise UserError(f"--dims {text!r}: expected each axis once")
    return tuple(axes)


def boundary(text: str | None) -> dict[str, tuple[str, str]]:
    """Return axis -> the types of its two ends, from x=periodic,y=wall:open."""
    form = "x=periodic,y=wall, or y=wall:open for its lower and upper end"
    made = {}
    for axis, kinds in pairs(text, "--boundary", form).items() if text else ():
        if axis not in ("x", "y"):
            raise UserError(f"--boundary {text!r}: expected {form}")
        ends = kinds.split(":")
        made[axis] = (ends[0], ends[-1])
    return made


def extent(text: str | None) -> dict[str, tuple[float, float]]:
    """Return axis -> (lower, upper end), from L, Lx,Ly or x0,x1,y0,y1. UserError for anything else."""
    if text is None:
        return {}
    try:
        numbers = [float(one) for one in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) in (1, 2):
        numbers = [0.0, numbers[0], 0.0, numbers[-1]]
    if (
        len(numbers) != 4
        or not np.isfinite(numbers).all()
        or not numbers[0] < numbers[1]
        or not numbers[2] < numbers[3]
    ):
        raise UserError(
            f"--extent {text!r}: expected the length of the domain (6.2832), its two lengths along x and y (2,1), or "
            "x0,x1,y0,y1"
        )
    return {"x": (numbers[0], numbers[1]), "y": (numbers[2], numbers[3])}


def fractions(text: str) -> tuple[float, ...]:
    """Return the fractions of --split."""
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise UserError(f"--split {text!r}: expected fractions of train, valid and test, as in 0.8,0.1,0.1") from None


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """Return whole numbers separated by commas."""
    items = [one.strip() for one in (text or "").split(",") if one.strip()]
    if not all(one.isdecimal() for one in items):
        raise UserError(f"{option} {text!r}: expected numbers of trajectories, as in 3,7")
    return tuple(map(int, items))


def expand(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the files that paths and globs name, sorted within each glob. UserError for a glob that names none."""
    found: list[Path] = []
    for text in patterns:
        path = Path(text)
        if path.exists() or not any(sign in text for sign in "*?["):
            found.append(path)
            continue
        root = Path(path.anchor) if path.is_absolute() else Path()
        inside = sorted(root.glob(str(path.relative_to(root) if path.is_absolute() else path)))
        if not inside:
            raise UserError(f"{text}: expected files of this pattern, found none")
        found += inside
    return tuple(dict.fromkeys(found))

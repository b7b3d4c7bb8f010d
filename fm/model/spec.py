"""What defines a model: its sizes and switches (`ModelConfig`), and the facts of each dataset (`DatasetSpec`).

Both are pydantic dataclasses: a wrong type, an impossible value or an unknown key is a ValidationError, which is a
ValueError, and `explain` puts it in words. model.json holds both (fm/model/files.py).
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import torch
from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import to_json as to_json_text
from torch import Tensor

from data_pipeline.errors import brief, shortened
from data_pipeline.files import file_name
from fm.model.block import BlockConfig
from fm.model.imports import FORMS, IMPORT, SETTINGS, ImportSettings
from fm.model.scalars import ScalarStats
from fm.model.wavelets import Periodic

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)  # for every class of settings
Wavelet = Literal["haar", "bior2.2", "bior4.4"]  # the names in wavelets.WAVELETS
Predict = Literal["delta", "state"]
BoundaryType = Annotated[str, Field(pattern="^(WALL|OPEN|PERIODIC)$")]
SOLVABLE = (("PERIODIC", "PERIODIC"), ("WALL", "WALL"))  # ends of an axis that `constraints.solenoidal` knows
MAX_SIDE = 2**14  # grid points of a side; fields on twice that would not fit into memory
MAX_FAULTS = 10  # that one message lists
T = TypeVar("T")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DatasetSpec:
    """What the model must know of a dataset, all from its manifest."""

    name: str
    state_channels: Annotated[tuple[str, ...], Field(min_length=1)]
    constant_channels: tuple[str, ...]
    boundary: tuple[tuple[BoundaryType, BoundaryType], tuple[BoundaryType, BoundaryType]]  # (lower, upper) of x, of y
    stats: Mapping[str, Mapping[str, float]]  # mean, std, mean_delta, std_delta -> channel -> value in raw units
    grid: tuple[int, int] | None = None  # (H, W) of the training data; None: not known
    dt: float | None = None  # physical time that one step advances; None: not known, or it differs by trajectory
    # What a model with `constraints` holds its predictions to (fm/model/constraints.py), from the dataset's card.
    conserved: tuple[tuple[Literal["mean", "mean_square", "divergence"], tuple[str, ...]], ...] = ()
    ranges: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)  # by channel
    # From a grid point to the next along x and y, negative where the axis runs backward; a divergence needs it.
    spacing: tuple[float, float] | None = None
    scalars: Mapping[str, ScalarStats] = dataclasses.field(default_factory=dict)  # that condition the model, by name

    def __post_init__(self) -> None:
        for name in (self.name, *self.state_channels, *self.constant_channels, *self.scalars):
            if file_name(name) != name or "." in name:  # torch separates the parts of parameter names by dots
                raise ValueError(f"dataset {brief(self.name)}: a name must be without dots, got {brief(name)}")
        if self.dt is not None and not 0 < self.dt < inf:
            raise ValueError(f"dataset {self.name}: expected a time step above 0, got {self.dt}")
        for name, (lowest, highest) in self.ranges.items():
            if lowest is not None and highest is not None and lowest > highest:
                raise ValueError(
                    f"dataset {self.name}: {name}: expected the lowest value first, got {lowest}, {highest}"
                )
        if self.grid is not None and not 0 < min(self.grid) <= max(self.grid) <= MAX_SIDE:
            raise ValueError(
                f"dataset {self.name}: expected a grid of at most {MAX_SIDE} points a side, got {self.grid}"
            )
        for axis, (lower, upper) in zip("xy", self.boundary, strict=True):
            if (lower == "PERIODIC") != (upper == "PERIODIC"):
                raise ValueError(f"dataset {self.name}: {axis} is periodic at one end only: {(lower, upper)}")
        if self.spacing is not None and not all(isfinite(step) and step for step in self.spacing):
            raise ValueError(
                f"dataset {self.name}: expected a spacing of finite steps other than 0, got {self.spacing}"
            )
        for name in (*self.ranges, *(name for _, names in self.conserved for name in names)):
            if name not in self.state_channels:
                raise ValueError(f"dataset {self.name}: a constraint is on {name!r}, which is no state channel")
        for kind, names in self.conserved:
            solvable = self.spacing is not None and all(ends in SOLVABLE for ends in self.boundary)
            if kind == "divergence" and not (len(names) == 2 and solvable):
                raise ValueError(
                    f"dataset {self.name}: a divergence needs two channels, the spacing of the grid, and axes that are "
                    f"periodic or end at walls, got {names}, {self.spacing}, {self.boundary}"
                )

    @property
    def periodic(self) -> Periodic:
        """Is x periodic, is y periodic."""
        return self.boundary[0][0] == "PERIODIC", self.boundary[1][0] == "PERIODIC"

    @property
    def channels(self) -> tuple[str, ...]:
        """State channels, then constant ones."""
        return (*self.state_channels, *self.constant_channels)

    def inputs(self, context: int) -> tuple[str, ...]:
        """Return the names of all that a model of `context` frames reads, in the order in which it reads them.

        State channels of the last frame, their change from the frame before it (`velocity_x@1`), the change before
        that, and so on, then constant channels.
        """
        earlier = (f"{name}@{lag}" for lag in range(1, context) for name in self.state_channels)
        return (*self.state_channels, *earlier, *self.constant_channels)

    def moment(self, statistic: str, channels: Sequence[str]) -> Tensor:
        """Return one statistic of the channels, float64 (C, 1, 1). ValueError names what is missing or not finite."""
        values = self.stats.get(statistic, {})
        missing = [name for name in channels if name not in values]
        if missing:
            raise ValueError(f"dataset {self.name}: no statistic {statistic!r} for channels {', '.join(missing)}")
        damaged = [f"{name} = {values[name]}" for name in channels if not isfinite(values[name])]
        if damaged:
            raise ValueError(f"dataset {self.name}: statistic {statistic!r} is not finite: {', '.join(damaged)}")
        negative = [f"{name} = {values[name]}" for name in channels if values[name] < 0 and statistic.startswith("std")]
        if negative:
            raise ValueError(f"dataset {self.name}: statistic {statistic!r} is below 0: {', '.join(negative)}")
        chosen = [values[name] for name in channels]
        return torch.tensor(chosen, dtype=torch.float64, device="cpu").view(-1, 1, 1)


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Sizes, and one switch for each ablation of the paper's Tables 1, 13 and 14."""

    width: PositiveInt = 256  # token width D
    depth: PositiveInt = 10  # number of blocks
    heads: PositiveInt = 8  # attention heads; the head width D / heads must be a multiple of 4
    mlp_ratio: PositiveFloat = 4.0  # hidden width of the MLP over D
    wavelet: Wavelet = "bior2.2"
    levels: Literal[1, 2] = 1  # wavelet levels; a token covers 2**levels points along each axis
    tokenizer: Literal["wavelet", "conv"] = "wavelet"  # conv: a learned strided convolution in and its transpose out
    pyramid_levels: Literal[0, 1, 2, 3, 4] = 1  # coarser levels of each block
    attention: Literal["linear", "softmax"] = "linear"  # softmax: for comparison, without ridge
    # none: plain linear attention; scaled: plain, divided by the head width, so that it starts at the scale of ridge;
    # least_squares: lambda = 0
    ridge: Literal["ridge", "none", "scaled", "least_squares"] = "ridge"
    kernel_gate: bool = True  # sigmoid gate on what attention reads
    lepe: bool = True  # depthwise convolution of the values added to what attention reads
    cpe: bool = True  # the two depthwise convolutions on the residual stream
    mila: bool = True  # SiLU(DWConv) before attention and the SiLU gate after it
    padding: Literal["boundary", "zeros"] = "boundary"  # of depthwise convolutions; boundary: circular on periodic axes
    extension: Literal["reflect", "boundary"] = "reflect"  # of the wavelets; boundary: wrap on periodic axes
    predict: Predict = "delta"  # delta (the change, in units of its own std) or state (the next frame)
    predict_override: Mapping[str, Predict] = dataclasses.field(default_factory=dict)  # by dataset
    # Each head also maps the state's channels point by point, C x C, for steps that are (partly) such a map, as a
    # rotation of two channels into each other. Not in the paper.
    pointwise: bool = False
    # wavelet: each head writes the wavelet coefficients of its output, so the edges of tokens' patches may show. conv:
    # it writes feature maps, which are interpolated, and two 3x3 convolutions at full resolution turn them and the
    # inputs into the output. Not in the paper.
    decoder: Literal["wavelet", "conv"] = "wavelet"
    decoder_width: PositiveInt = 32  # feature maps, and channels between the two convolutions
    # Hold each prediction to the conserved quantities and ranges of the dataset's card. Not in the paper.
    constraints: bool = False
    # scalars: the PDE parameters in the dataset's card and the time step of a trajectory condition the model
    # (fm/model/scalars.py). Not in the paper.
    condition: Literal["none", "scalars"] = "none"
    # Rank of each dataset's own updates to the blocks' matrices (fm/model/block.py, BlockAdapter); 0: no adapters. Not
    # in the paper.
    adapter_rank: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"width / heads must be a multiple of 4 (2D RoPE), got {self.width} / {self.heads}")
        if self.attention == "softmax" and self.ridge != "none":
            raise ValueError(f"attention: softmax has no ridge, expected ridge: none, got {self.ridge}")
        if self.adapter_rank > self.width:
            raise ValueError(
                f"adapter_rank: expected at most the width, which gives every update, {self.width}, got "
                f"{self.adapter_rank}"
            )

    @property
    def subbands(self) -> int:
        """Coefficients per channel and token, S = 4**levels."""
        return 4**self.levels

    def block(self) -> BlockConfig:
        """Return the part that one block needs."""
        return BlockConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(BlockConfig)})


# The joint model of the paper is the larger one, with the lifting, task vectors and heads of eight datasets.
PRESETS = {
    "1.2M": ModelConfig(width=128, depth=5, heads=4),
    "9.5M": ModelConfig(width=256, depth=10, heads=8),
}


# Keys that are written only where they differ from these values, so that models without them keep their files' bytes.
UNWRITTEN: Mapping[str, Any] = {"condition": "none", "scalars": {}, "adapter_rank": 0}


ONE, MORE = "<one>", "<more>"  # how pydantic's errors name the two types of OneOrMore
TAGS = (*FORMS, ONE, MORE)  # parts of an error's path that are no keys
# A text, or a list of one or more texts.
OneOrMore: TypeAlias = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[list[str], Field(min_length=1), Tag(MORE)],
    Discriminator(lambda value: MORE if isinstance(value, list) else ONE),
]


def to_json(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain lists, dicts, strings and numbers, without what is UNWRITTEN."""
    plain = json.loads(json.dumps(dataclasses.asdict(value)))
    return written({_key(name): part for name, part in plain.items()})


def _key(field: str) -> str:
    """Return a field's name in files: `import` of `import_`, since a Python keyword is no name for a field."""
    return field.removesuffix("_")


def written(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a dataclass without what is UNWRITTEN."""
    return {key: value for key, value in plain.items() if key not in UNWRITTEN or value != UNWRITTEN[key]}


def from_json(cls: type[T], value: Any, where: str) -> T:
    """Return the `cls` whose `to_json` is `value`; what is UNWRITTEN gets the value that was not written.

    ValueError, naming `where`, for a wrong value, an unknown key, or a missing one: its default may change.
    """
    names = {_key(f.name) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if isinstance(value, dict):
        value = {**{key: default for key, default in UNWRITTEN.items() if key in names}, **value}
    try:
        made = from_plain(cls, value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    missing = sorted(names - set(value))
    if missing:
        raise ValueError(f"{where}: missing keys {missing}")
    return made


def from_plain(cls: type[T], value: Any) -> T:
    """Return plain values as a `cls` with exactly its types: true is no number, and neither is "1".

    ValueError as of `explain`.
    """
    try:
        # JSON's strict mode takes no text for a number, but a list for a tuple and a mapping for a dataclass.
        return TypeAdapter(cls).validate_json(to_json_text(value, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        raise ValueError(explain(error, cls)) from error


def explain(error: ValidationError, cls: Any) -> str:
    """Return one line for each fault in what should be a `cls`: key path, expectation, value, nearest valid name."""
    faults = error.errors(include_url=False)
    lines = [_explained(fault, cls) for fault in faults[:MAX_FAULTS]]
    return "\n".join([*lines, f"and {len(faults) - MAX_FAULTS} more faults"] if len(faults) > MAX_FAULTS else lines)


def _explained(fault: Any, cls: Any) -> str:
    key, value = ".".join(str(part)[:64] for part in fault["loc"] if part not in TAGS), fault["input"]
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] == "unexpected_keyword_argument":
        *parents, name = fault["loc"]
        valid = _keys(cls, parents)
        near = difflib.get_close_matches(str(name)[:64], valid, n=1)
        path = [str(part) for part in parents if part not in FORMS]
        meant = f"did you mean {'.'.join([*path, *near])}?" if near else f"valid here: {', '.join(valid)}"
        return f"unknown key {key} (value {brief(value)}); {meant}"
    # The messages of our own checks hold the value already, and a whole section is no help.
    shown = "" if fault["type"] == "value_error" or isinstance(value, dict) else f" (got {brief(value)})"
    near = []
    if fault["type"] == "literal_error":
        valid = [part.strip(" '") for part in fault["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(value)[:64], valid, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    message = shortened(fault["msg"].removeprefix("Value error, "), 500)
    return f"{key}: {message}{shown}{meant}".removeprefix(": ")  # checks of the whole have no key


def _keys(cls: Any, parents: Sequence[Any]) -> list[str]:
    """Return the keys of the dataclass at the path `parents` inside `cls`.

    A section may be optional, and may have two FORMS, one of which is then part of the path.
    """
    options: tuple[Any, ...] = (cls,)
    for part in parents:
        if part in FORMS:
            options = tuple(one for one in options if (_imports(one)) == (part == IMPORT))
            continue
        hint = typing.get_type_hints(next(one for one in options if dataclasses.is_dataclass(one)))[part]
        options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    also = ["import"] if parents and parents[-1] == SETTINGS else []
    fields = dataclasses.fields(next(one for one in options if dataclasses.is_dataclass(one)))
    return [*(_key(one.name) for one in fields), *also]


def _imports(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, ImportSettings)

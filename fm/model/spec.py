"""What defines a model: its sizes and switches, and what it must know of each dataset."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from fm.model.attention import RIDGE_MODES
from fm.model.block import BlockConfig
from fm.model.wavelets import WAVELETS, Periodic

BOUNDARY_TYPES = ("WALL", "OPEN", "PERIODIC")


@dataclass(frozen=True)
class DatasetSpec:
    """What the model must know of a dataset, all from its manifest."""

    name: str
    state_channels: tuple[str, ...]
    constant_channels: tuple[str, ...]
    boundary: tuple[tuple[str, str], tuple[str, str]]  # (lower, upper) of x, of y: WALL, OPEN or PERIODIC
    stats: Mapping[str, Mapping[str, float]]  # mean, std, mean_delta, std_delta -> channel -> value in raw units
    grid: tuple[int, int] | None = None  # (H, W) of the training data; None: not known
    dt: float | None = None  # physical time that one step advances; None: not known, or it differs by trajectory

    def __post_init__(self) -> None:
        for name in (self.name, *self.state_channels, *self.constant_channels):
            if not name or "." in name:
                raise ValueError(f"dataset {self.name!r}: a name must be non-empty and without dots, got {name!r}")
        if not self.state_channels:
            raise ValueError(f"dataset {self.name}: at least one state channel is needed")
        for axis, pair in zip("xy", self.boundary, strict=True):
            if len(pair) != 2 or any(kind not in BOUNDARY_TYPES for kind in pair):
                raise ValueError(f"dataset {self.name}: boundary of {axis} must be two of {BOUNDARY_TYPES}, got {pair}")
            if (pair[0] == "PERIODIC") != (pair[1] == "PERIODIC"):
                raise ValueError(f"dataset {self.name}: {axis} is periodic at one end only: {pair}")

    @property
    def periodic(self) -> Periodic:
        """Is x periodic, is y periodic."""
        return self.boundary[0][0] == "PERIODIC", self.boundary[1][0] == "PERIODIC"

    def moment(self, statistic: str, channels: Sequence[str]) -> Tensor:
        """One statistic of the channels, float64 (C, 1, 1). ValueError names what is missing or not finite."""
        values = self.stats.get(statistic, {})
        missing = [name for name in channels if name not in values]
        if missing:
            raise ValueError(f"dataset {self.name}: no statistic {statistic!r} for channels {', '.join(missing)}")
        damaged = [f"{name} = {values[name]}" for name in channels if not isfinite(values[name])]
        if damaged:
            raise ValueError(f"dataset {self.name}: statistic {statistic!r} is not finite: {', '.join(damaged)}")
        return torch.tensor([values[name] for name in channels], dtype=torch.float64).view(-1, 1, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DatasetSpec":
        """Inverse of `to_json`."""
        check_keys("dataset specification", value, (f.name for f in fields(cls)))
        (x0, x1), (y0, y1) = value["boundary"]
        return cls(
            name=value["name"],
            state_channels=tuple(value["state_channels"]),
            constant_channels=tuple(value["constant_channels"]),
            boundary=((x0, x1), (y0, y1)),
            stats=value["stats"],
            grid=None if value["grid"] is None else (value["grid"][0], value["grid"][1]),
            dt=value["dt"],
        )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, and one switch for each ablation of the paper's Tables 13 and 14."""

    width: int = 256  # token width D
    depth: int = 10  # number of blocks
    heads: int = 8  # attention heads; the head width D / heads must be a multiple of 4
    mlp_ratio: float = 4.0  # hidden width of the MLP over D
    wavelet: str = "bior2.2"  # haar, bior2.2 or bior4.4
    levels: int = 1  # wavelet levels, 1 or 2; a token covers 2**levels points along each axis
    tokenizer: str = "wavelet"  # wavelet, or conv: a learned strided convolution in and its transpose out
    pyramid_levels: int = 1  # coarser levels of each block, 0 to 4
    ridge: str = "ridge"  # ridge, none (plain linear attention) or least_squares (lambda = 0)
    kernel_gate: bool = True  # sigmoid gate on what attention reads
    lepe: bool = True  # depthwise convolution of the values added to what attention reads
    cpe: bool = True  # the two depthwise convolutions on the residual stream
    mila: bool = True  # SiLU(DWConv) before attention and the SiLU gate after it
    padding: str = "boundary"  # of depthwise convolutions: boundary (circular on periodic axes) or zeros
    extension: str = "reflect"  # of the wavelets: reflect, or boundary (wrap on periodic axes)
    predict: str = "delta"  # delta (the change, in units of its own std) or state (the next frame)
    predict_override: Mapping[str, str] = field(default_factory=dict)  # dataset -> delta or state
    # Each head also maps the state's channels point by point, C x C, where a step is (partly) such a map, as a rotation
    # of two channels into each other; not the paper's
    pointwise: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"model.width / model.heads must be a multiple of 4 (2D RoPE), got {self.width} / {self.heads}"
            )
        if self.mlp_ratio <= 0:
            raise ValueError(f"model.mlp_ratio must be positive, got {self.mlp_ratio}")
        choices: dict[str, Sequence[str | int]] = {
            "wavelet": tuple(WAVELETS),
            "levels": (1, 2),
            "tokenizer": ("wavelet", "conv"),
            "pyramid_levels": (0, 1, 2, 3, 4),
            "ridge": RIDGE_MODES,
            "padding": ("boundary", "zeros"),
            "extension": ("reflect", "boundary"),
            "predict": ("delta", "state"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"model.{name} must be one of {', '.join(map(str, valid))}, got {getattr(self, name)!r}"
                )
        for name, value in self.predict_override.items():
            if value not in choices["predict"]:
                raise ValueError(f"model.predict_override.{name} must be delta or state, got {value!r}")

    @property
    def subbands(self) -> int:
        """Coefficients per channel and token, S = 4**levels."""
        return 4**self.levels

    def block(self) -> BlockConfig:
        """The part that one block needs."""
        return BlockConfig(**{f.name: getattr(self, f.name) for f in fields(BlockConfig)})

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "ModelConfig":
        """Inverse of `to_json`. ValueError, naming `where`, for unknown or missing keys."""
        check_keys(f"config of {where}", value, (f.name for f in fields(cls)))
        return cls(**value)


# The blocks of width 256, depth 10 hold 9.3M; the joint model's wider MLP brings it, with lifting and heads, to 10M.
PRESETS = {
    "1.2M": ModelConfig(width=128, depth=5, heads=4),
    "9.5M": ModelConfig(width=256, depth=10, heads=8),
    "10M": ModelConfig(width=256, depth=10, heads=8, mlp_ratio=4.5),
}


def check_keys(where: str, value: Mapping[str, Any], names: Iterable[str], optional: Iterable[str] = ()) -> None:
    """ValueError, naming `where`, unless the keys of `value` are exactly `names`, of which `optional` may be absent."""
    known = set(names) | set(optional)
    missing, unexpected = sorted(known - set(value) - set(optional)), sorted(set(value) - known)
    if missing or unexpected:
        raise ValueError(f"{where}: missing keys {missing}, unexpected keys {unexpected}")

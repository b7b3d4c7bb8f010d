"""PDE parameters that condition a model: numbers of a whole trajectory, such as a viscosity, and its time step.

With `model.condition: scalars` the numbers of a trajectory add the same vector to all of its tokens,

    sum over the dataset's scalars s of z_s * W[s],   no bias,

beside the dataset's task vector. z_s is the number in units of its spread over the training trajectories, and the row
W[s] (D,) belongs to the name s, as a channel's rows do. A number that is not given has z_s = 0, which changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, log10, nan
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from pydantic import ConfigDict, NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from data_pipeline.errors import UserError

Scalars: TypeAlias = Mapping[str, Any]  # name -> number, or (B,) numbers as array or tensor; raw, NaN where missing
TIME_STEP = "dt"  # the name of the time between frames among the scalars
WIDE = 10.0  # highest over lowest value from which on the logarithm is taken: Rayleigh numbers run from 1e6 to 1e10
SAME = 1e-4  # relative difference below which values are equal, as the time steps of a dataset are


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ScalarStats:
    """The distribution of one scalar over the training trajectories that have it."""

    mean: float  # of the values, or of their decimal logarithms
    std: NonNegativeFloat  # likewise; 0 where all values are equal
    lowest: float
    highest: float
    log: bool  # whether the logarithm is taken

    def __post_init__(self) -> None:
        if not self.lowest <= self.highest or (self.log and self.lowest <= 0):
            above = " above 0" if self.log else ""
            raise ValueError(f"expected the lowest value{above} first, got {self.lowest}, {self.highest}")

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the statistics of the values of at least one trajectory. ValueError where they are not finite."""
        lowest, highest = min(values), max(values)
        log = lowest > 0 and lowest * WIDE <= highest
        spread = np.array([log10(value) for value in values] if log else values, np.float64)
        same = highest - lowest <= SAME * max(abs(lowest), abs(highest))
        with np.errstate(over="ignore"):  # checked below
            mean, std = float(spread.mean()), 0.0 if same else float(spread.std())
        if not (isfinite(mean) and isfinite(std)):
            raise ValueError(f"expected values whose mean and spread are finite, got {lowest} to {highest}")
        return cls(mean, std, lowest, highest, log)

    def normalize(self, values: Tensor) -> Tensor:
        """Return values in units of their spread around their mean; 0 for NaN, which stands for a missing value."""
        if self.std == 0:
            return torch.zeros_like(values)
        spread = values.log10() if self.log else values
        return torch.where(values.isnan(), 0.0, (spread - self.mean) / self.std)


def normalized(values: Tensor, stats: Iterable[ScalarStats]) -> Tensor:
    """Scale the columns of values (B, P) in raw units by their statistics; 0 where a value is missing (NaN)."""
    columns = zip(values.unbind(1), stats, strict=True)
    return torch.stack([one.normalize(column) for column, one in columns], dim=1)


def normalized_scalars(scalars: Scalars, stats: Mapping[str, ScalarStats], batch: int, device: torch.device) -> Tensor:
    """Return the scalars named in `stats`, normalized, (B, P) float32 on `device`, where `batch` is B.

    Others are not used, and missing ones become 0. UserError for a value up to 0 where the logarithm is taken.
    """
    columns = []
    for name, one in stats.items():
        values = torch.as_tensor(scalars.get(name, nan), dtype=torch.float64, device="cpu")
        if one.log and bool((values <= 0).any()):
            raise UserError(
                f"scalar {name}: expected values above 0, as in the training data, since logarithms are taken; got "
                f"{values.min():g}"
            )
        columns.append(values.expand(batch))
    made = normalized(torch.stack(columns, dim=1), stats.values()).float()
    if device.type == "cuda":  # a GPU copies without making the host wait only from page-locked memory
        made = made.pin_memory()
    return made.to(device, non_blocking=True)


class ScalarEmbedding(nn.Module):
    """Map the normalized scalars of a trajectory to a vector that is added to its tokens.

    The rows start at zero: an untrained scalar changes nothing.
    """

    def __init__(self, names: Iterable[str], width: int) -> None:
        super().__init__()
        self.rows = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in sorted(set(names))})

    def forward(self, scalars: Tensor, names: Sequence[str]) -> Tensor:
        """Map the named scalars (B, P) to vectors (B, D)."""
        weight = torch.stack([self.rows[name] for name in names])  # (P, D)
        with torch.autocast(scalars.device.type, enabled=False):
            return scalars.to(weight.dtype) @ weight

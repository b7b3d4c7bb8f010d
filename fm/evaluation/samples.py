"""One channel of a rollout at some steps: what pictures show, kept in samples.npz so that they can be redrawn."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import atomic_file
from data_pipeline.registry import Domain
from fm.evaluation.errors import check_names, stored_arrays

FORMAT = 2  # 2: the unit of the channel and the scalars of the trajectory
READABLE = (1, 2)
SAMPLES_FILE = "samples.npz"
ARRAYS = ("truth", "prediction", "vrmse")
CORRELATED = 0.8  # a prediction with a lower correlation has lost the truth (Kochkov et al. 2021, PNAS 118)


@dataclass(frozen=True)
class Sample:
    """One channel of one rollout at n of its steps; fields (n, H, W) in physical units, axis 0 of a field is x."""

    dataset: str
    channel: str
    trajectory: int
    dt: float | None  # physical time between frames; None if it differs
    steps: tuple[int, ...]  # rollout steps, 1-based and ascending
    truth: np.ndarray
    prediction: np.ndarray
    vrmse: np.ndarray  # (n,) of this channel
    domain: Domain | None = None  # physical extent of the grid; None if the card does not give it
    unit: str = ""  # of the channel, as channels.yaml has it; empty if it is not known
    scalars: Mapping[str, float] = field(default_factory=dict)  # parameters of the trajectory, such as a viscosity

    @property
    def extent(self) -> Domain:
        """The domain, or the number of cells along x and y if the domain is not known."""
        _, width, height = self.truth.shape
        return self.domain or ((0.0, float(width)), (0.0, float(height)))

    @property
    def lengths(self) -> tuple[float, float]:
        """Lengths of the extent along x and y."""
        (left, right), (bottom, top) = self.extent
        return right - left, top - bottom

    @property
    def spacing(self) -> tuple[float, float]:
        """Distances between grid points along x and y."""
        _, width, height = self.truth.shape
        return self.lengths[0] / width, self.lengths[1] / height

    @property
    def extent_text(self) -> str:
        """The extent in words, for captions."""
        if self.domain is None:
            return f"{self.truth.shape[1]} x {self.truth.shape[2]} cells, grid units"
        return ", ".join(f"{axis} {low:.3g}..{high:.3g}" for axis, (low, high) in zip("xy", self.domain, strict=True))

    def time_text(self, step: int) -> str:
        """The time of a step after the initial frame, as far as it is known."""
        return "" if self.dt is None else f"t\N{SUBSCRIPT ZERO} + {step * self.dt:.3g}"

    @property
    def apart_text(self) -> str:
        """The time between frames in words, for captions."""
        return "frames unevenly apart in time" if self.dt is None else f"frames {self.dt:.4g} apart in time"

    @property
    def label(self) -> str:
        """The channel with the first part of its unit."""
        unit = self.unit.partition(";")[0].strip()
        return f"{self.channel} ({unit})" if unit not in ("", "none") else self.channel

    @property
    def correlations(self) -> np.ndarray:
        """Pearson's correlation over x, y of prediction and truth, (n,); 0 where the prediction is not finite.

        NaN where the truth is constant, so that there is nothing to correlate.
        """
        found = np.zeros(len(self.steps))
        for index, (truth, prediction) in enumerate(zip(self.truth, self.prediction, strict=True)):
            true, predicted = (np.asarray(part, np.float64) for part in (truth, prediction))
            true, predicted = true - true.mean(), predicted - predicted.mean()
            if not true.any():
                found[index] = np.nan
            elif np.isfinite(predicted).all() and predicted.any():
                # Divided by its largest value first: squares of large values would overflow.
                true, predicted = true / np.abs(true).max(), predicted / np.abs(predicted).max()
                found[index] = (true * predicted).sum() / np.sqrt((true**2).sum() * (predicted**2).sum())
        return found

    def correlated_steps(self) -> float | None:
        """Return the number of steps until the correlation falls below CORRELATED; None if it never does.

        Between two steps of the sample, and between the given frame, whose correlation is 1, and the first of them,
        the correlation is taken to be linear.
        """
        before, value = 0.0, 1.0
        for step, correlation in zip(self.steps, self.correlations.tolist(), strict=True):
            if correlation < CORRELATED:
                return before + (step - before) * (value - CORRELATED) / (value - correlation)
            if np.isfinite(correlation):
                before, value = float(step), correlation
        return None

    def at(self, indices: Sequence[int]) -> "Sample":
        """Return the same rollout at fewer of its steps."""
        chosen = list(indices)
        arrays = {name: getattr(self, name)[chosen] for name in ARRAYS}
        return dataclasses.replace(self, steps=tuple(self.steps[index] for index in chosen), **arrays)


def evenly_spaced(count: int, shown: int) -> list[int]:
    """Return `shown` of the indices 0..count-1, evenly spaced with both ends, or all if there are fewer."""
    return np.unique(np.linspace(0, count - 1, min(count, shown)).round().astype(int)).tolist()


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write an .npz without pickled objects, whole or not at all; UserError when the disk is full."""
    heads = [{name: value for name, value in vars(one).items() if name not in ARRAYS} for one in samples]
    arrays: dict[str, Any] = {"head": np.array(json.dumps({"format": FORMAT, "samples": heads}))}
    for number, sample in enumerate(samples):
        for name in ARRAYS:
            arrays[f"{number}/{name}"] = getattr(sample, name)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def load_samples(path: Path) -> list[Sample]:
    """Read a file of `save_samples`; UserError if it is missing, damaged, or of another format."""
    with stored_arrays(path, SAMPLES_FILE, READABLE) as (head, arrays):
        return [_unpack(arrays, number, facts) for number, facts in enumerate(head["samples"])]


def _unpack(arrays: Mapping[str, np.ndarray], number: int, facts: Mapping[str, Any]) -> Sample:
    truth, prediction, vrmse = (arrays[f"{number}/{name}"] for name in ARRAYS)
    steps, domain = tuple(facts["steps"]), facts["domain"]
    if truth.ndim != 3 or prediction.shape != truth.shape or not len(truth) == len(vrmse) == len(steps) > 0:
        raise ValueError(
            f"sample {number}: truth {truth.shape}, prediction {prediction.shape}, vrmse {vrmse.shape} at "
            f"{len(steps)} steps"
        )
    check_names(facts["dataset"], [facts["channel"]])
    domain = domain and tuple((low, high) for low, high in domain)
    unit, scalars = facts.get("unit", ""), facts.get("scalars", {})
    if not isinstance(unit, str) or not all(isinstance(value, float | int) for value in scalars.values()):
        raise ValueError(f"sample {number}: expected a unit and scalars, got {unit!r} and {scalars!r}")
    return Sample(**{**facts, "steps": steps, "domain": domain}, truth=truth, prediction=prediction, vrmse=vrmse)

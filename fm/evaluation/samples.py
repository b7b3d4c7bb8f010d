"""One channel of a rollout at some steps: what pictures show, kept in samples.npz so that they can be redrawn."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import atomic_file
from data_pipeline.registry import Domain
from fm.evaluation.errors import check_names, stored_arrays

FORMAT = 1
SAMPLES_FILE = "samples.npz"
ARRAYS = ("truth", "prediction", "vrmse")


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
        return "" if self.dt is None else f"t + {step * self.dt:.3g}"

    @property
    def apart_text(self) -> str:
        """The time between frames in words, for captions."""
        return "frames unevenly apart in time" if self.dt is None else f"frames {self.dt:.4g} apart in time"

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
    with stored_arrays(path, SAMPLES_FILE, (FORMAT,)) as (head, arrays):
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
    return Sample(**{**facts, "steps": steps, "domain": domain}, truth=truth, prediction=prediction, vrmse=vrmse)

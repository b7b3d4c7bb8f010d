"""Cosines between the gradients of datasets, as a run logs them (tracking.gradient_cosine_every)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines between the gradients of n datasets with respect to the parameters that all of them use.

    Near +1 a step for one dataset is a step for the other, near 0 the two are unrelated, below 0 a step for one undoes
    a step for the other (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning"). The gradient of a few windows is
    noisy, which draws the cosines towards 0; means over a run are steadier than one measurement.
    """

    datasets: tuple[str, ...]
    matrix: np.ndarray  # (n, n); NaN where one of the two gradients is zero or not finite
    norms: np.ndarray  # (n,) of the gradients

    def with_others(self) -> dict[str, float]:
        """Return each dataset's mean cosine with the others, over the finite ones; NaN if there is none."""
        others = np.where(np.eye(len(self.datasets), dtype=bool), np.nan, self.matrix)
        return dict(zip(self.datasets, _finite_mean(others, axis=1).tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return JSON types, with null for a number that is not finite."""

        def finite(values: list[float]) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values]

        matrix = [finite(row) for row in self.matrix.tolist()]
        return {"datasets": list(self.datasets), "matrix": matrix, "norms": finite(self.norms.tolist())}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Cosines":
        """Return the inverse of `to_json`; ValueError, TypeError or KeyError for another document."""
        datasets = tuple(document["datasets"])
        matrix, norms = np.array(document["matrix"], np.float64), np.array(document["norms"], np.float64)
        if matrix.shape != (len(datasets), len(datasets)) or norms.shape != (len(datasets),):
            raise ValueError(f"{len(datasets)} datasets, but a matrix {matrix.shape} and norms {norms.shape}")
        return cls(datasets, matrix, norms)


def mean_cosines(measured: Sequence[Cosines]) -> Cosines:
    """Return the mean of measurements of the same datasets; of each cosine over its finite values."""
    (datasets,) = {cosines.datasets for cosines in measured}
    matrix = _finite_mean(np.stack([cosines.matrix for cosines in measured]), axis=0)
    return Cosines(datasets, matrix, _finite_mean(np.stack([cosines.norms for cosines in measured]), axis=0))


def _finite_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the finite values, NaN where there is none."""
    finite = np.isfinite(values)
    total, count = np.where(finite, values, 0.0).sum(axis), finite.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)

"""What a much simpler predictor reaches: the best linear map of a grid point's own channels, alike at every point.

A model that does not beat it learnt less than pointwise algebra; a dataset where it is exact (helmholtz_staircase turns
the phase of every point by one angle) shows how far a model is from a map that is easy to write down.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PointwiseMap:
    """next = matrix @ (channels, 1) at each grid point; matrix (C, C + 1)."""

    matrix: np.ndarray

    @classmethod
    def fit(cls, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> "PointwiseMap":
        """Least squares over pairs of states and next states (B, C, H, W), by normal equations in float64.

        Channels that are copies of each other (a symmetric tensor's) share their weight.
        """
        gram: np.ndarray | float = 0.0
        moment: np.ndarray | float = 0.0
        for source, target in pairs:
            columns = _with_one(source)
            gram = gram + columns.T @ columns
            moment = moment + columns.T @ _columns(target)
        solution, *_ = np.linalg.lstsq(gram, moment, rcond=1e-12)
        return cls(solution.T)

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """The next states (B, C, H, W), float64."""
        batch, channels, height, width = states.shape
        return (_with_one(states) @ self.matrix.T).reshape(batch, height, width, channels).transpose(0, 3, 1, 2)


def _columns(states: np.ndarray) -> np.ndarray:
    """(B, C, H, W) to float64 (B H W, C)."""
    return states.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, states.shape[1])


def _with_one(states: np.ndarray) -> np.ndarray:
    columns = _columns(states)
    return np.concatenate([columns, np.ones((len(columns), 1))], axis=1)

"""Error files with scores that are known beforehand."""

import numpy as np

from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS, Protocol


def level_errors(
    num_trajectories: int, num_steps: int, num_channels: int, level: float, variance: float = 1.0
) -> Errors:
    """VRMSE `level` at every step of every channel at eps 0; 1 of persistence and of the mean field."""
    shape = (num_trajectories, num_steps, num_channels)
    return Errors(*(np.full(shape, variance * value) for value in (1.0, level**2, 1.0, 1.0)))


def error_file(
    protocol: Protocol = PROTOCOLS["thirds"], num_steps: int = 9, variance: float = 1.0, **levels: float
) -> ErrorFile:
    """A file of datasets whose VRMSE is the level throughout: 3 trajectories, 2 channels, grid 16 x 16."""
    datasets = {}
    for name, level in levels.items():
        errors = level_errors(3, num_steps, 2, level, variance)
        datasets[name] = DatasetErrors(("a", "b"), np.arange(3), errors, errors, f"digest of {name}", (16, 16))
    return ErrorFile(protocol, datasets)

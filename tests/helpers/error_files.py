"""Error files with scores that are known beforehand, and scores written by hand."""

from collections.abc import Sequence

import numpy as np

from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS, Protocol
from fm.evaluation.scores import Averages, BlockScores, DatasetScores, Scores, WindowScores


def level_errors(
    num_trajectories: int, num_steps: int, num_channels: int, level: float, variance: float = 1.0
) -> Errors:
    """VRMSE `level` at every step of every channel at eps 0; 1 of persistence and of the mean field, no stencil."""
    shape = (num_trajectories, num_steps, num_channels)
    return Errors(*(np.full(shape, variance * value) for value in (1.0, level**2, 1.0, 1.0, np.nan)))


def error_file(
    protocol: Protocol = PROTOCOLS["thirds"], num_steps: int = 9, variance: float = 1.0, **levels: float
) -> ErrorFile:
    """A file of datasets whose VRMSE is the level throughout: 3 trajectories, 2 channels, grid 16 x 16."""
    datasets = {}
    for name, level in levels.items():
        errors = level_errors(3, num_steps, 2, level, variance)
        datasets[name] = DatasetErrors(("a", "b"), np.arange(3), errors, errors, f"digest of {name}", (16, 16))
    return ErrorFile(protocol, datasets)


def errors_of(model: np.ndarray, persistence: float = 4.0) -> Errors:
    """Errors with VRMSE `model` (R, S, C) at eps 0: unit variance; NaN in `model` is a step that is not there."""
    there = ~np.isnan(model)
    variance = np.where(there, 1.0, np.nan)
    others = (np.where(there, value, np.nan) for value in (persistence**2, 0.81, np.nan))
    return Errors(variance, model**2, *others)


def dataset_errors(rollout: np.ndarray, one_step: np.ndarray | None = None) -> DatasetErrors:
    channels = tuple(f"c{index}" for index in range(rollout.shape[2]))
    one_step = rollout if one_step is None else one_step
    return DatasetErrors(
        channels, np.arange(len(rollout)) + 10, errors_of(one_step), errors_of(rollout), "d" * 64, (16, 16)
    )


def block_scores(vrmse: float | None, ratio: float | None = None, channels: Sequence[str] = ()) -> BlockScores:
    """One-step scores of one VRMSE, in all channels alike."""
    averages = (vrmse, vrmse, 1.0, 1.0, ratio)
    return BlockScores(*averages, 1, int(vrmse is None), {name: Averages(*averages) for name in channels})


def window_scores(vrmse: float | None, ratio: float | None = None) -> WindowScores:
    """Scores of one VRMSE in the window of the first step."""
    return WindowScores(first=1, last=1, **vars(block_scores(vrmse, ratio)))


def dataset_scores(one_step: BlockScores | None, windows: dict[str, WindowScores | None]) -> DatasetScores:
    return DatasetScores("digest", (16, 16), (), 1, 1, one_step, windows, {})


def made_scores(datasets: dict[str, DatasetScores], ratio: float | None = None) -> Scores:
    return Scores(2, {}, PROTOCOLS["thirds"], datasets, ratio, {}, 0)

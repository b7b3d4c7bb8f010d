"""Moments per channel: the Well's own stats.yaml, or the same figures streamed from the train files.

Statistics are {statistic: {channel: value}}: mean, std and rms of every channel, mean_delta, std_delta and rms_delta
(the change from one frame to the next) of the state channels. All are population moments, accumulated in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import yaml

from data_pipeline.files import UserError
from data_pipeline.registry import Card
from data_pipeline.well.hdf5 import WellFile, block_frames
from data_pipeline.well.layout import File, read_small

Stats = dict[str, dict[str, float]]
VALUE_STATISTICS = ("mean", "std", "rms")
DELTA_STATISTICS = ("mean_delta", "std_delta", "rms_delta")


class Moments:
    """Mean and variance per channel, one block at a time (Chan, Golub and LeVeque 1979, the pairwise update)."""

    def __init__(self, num_channels: int) -> None:
        self.count = 0
        self.mean = np.zeros(num_channels)
        self.squares = np.zeros(num_channels)  # sum of squared distances from the mean

    def add(self, values: np.ndarray) -> None:
        """Adds values (T, C, H, W)."""
        if values.size == 0:
            return
        values = values.astype(np.float64)
        count = values.size // values.shape[1]
        mean = values.mean(axis=(0, 2, 3))
        squares = np.square(values - mean[:, None, None]).sum(axis=(0, 2, 3))
        shift, total = mean - self.mean, self.count + count
        self.squares += squares + shift**2 * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def result(self, channels: Sequence[str], suffix: str = "") -> Stats:
        """mean, std and rms by channel; zeros if nothing was added."""
        variance = self.squares / max(self.count, 1)
        figures = {"mean": self.mean, "std": np.sqrt(variance), "rms": np.sqrt(variance + self.mean**2)}
        return {
            statistic + suffix: dict(zip(channels, map(float, values), strict=True))
            for statistic, values in figures.items()
        }


def compute_stats(
    files: Sequence[File],
    card: Card,
    frames_per_chunk: int,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
    skip_nonfinite: bool = False,
) -> Stats:
    """Statistics of all trajectories in `files`, read at most `frames_per_chunk` frames at a time.

    Raises UserError if there is no file, or if a field holds NaN or Inf; with `skip_nonfinite`, such frames and
    constant fields are left out.
    """
    if not files:
        raise UserError(f"{card.name}: no stats.yaml and no train files to compute it from; download one or the other")
    values, deltas = Moments(len(card.state_channels)), Moments(len(card.state_channels))
    constants = Moments(len(card.constant_channels))
    for path in files:
        with WellFile(path, card) as file:
            for trajectory in range(file.num_trajectories):
                _add_trajectory(file, trajectory, frames_per_chunk, values, deltas, on_bytes, skip_nonfinite)
                constant = file.constants(trajectory)
                if not skip_nonfinite:
                    file.check_finite(constant, trajectory, None)
                constants.add(constant[None][np.isfinite(constant[None]).all(axis=(1, 2, 3))])
    stats = values.result(card.state_channels) | deltas.result(card.state_channels, "_delta")
    for statistic, by_channel in constants.result(card.constant_channels).items():
        stats[statistic] |= by_channel
    return stats


def _add_trajectory(
    file: WellFile,
    trajectory: int,
    frames_per_chunk: int,
    values: Moments,
    deltas: Moments,
    on_bytes: Callable[[int], None],
    skip_nonfinite: bool,
) -> None:
    last = np.empty((0, len(file.card.state_channels), *file.grid), np.float32)
    step = min(frames_per_chunk, block_frames(4 * len(file.card.state_channels) * file.grid[0] * file.grid[1]))
    for first in range(0, file.num_frames, step):
        frames = file.read(trajectory, first, min(first + step, file.num_frames))
        if not skip_nonfinite:
            file.check_finite(frames, trajectory, first)
        with np.errstate(invalid="ignore"):  # Inf - Inf, of frames that are left out
            change = np.diff(np.concatenate([last, frames]).astype(np.float64), axis=0)
        for moments, block in ((values, frames), (deltas, change)):
            finite = np.isfinite(block).all(axis=(1, 2, 3)) if skip_nonfinite else np.array(True)
            moments.add(block if finite.all() else block[finite])
        last = frames[-1:]
        on_bytes(frames.nbytes)


def read_stats(path: File, card: Card) -> Stats:
    """Reads the Well's stats.yaml: {statistic: {field: number, or a list of components}}.

    Raises UserError when it is no YAML, lacks a statistic or a field, or holds something else than finite numbers.
    """
    content = parse_stats(path)
    stats: Stats = {}
    for statistic in VALUE_STATISTICS + DELTA_STATISTICS:
        fields = card.fields if statistic in VALUE_STATISTICS else card.state
        stats[statistic] = {}
        for field in fields:
            try:
                values = np.array([float(value) for value in _leaves(content[statistic][field.name])])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UserError(_lacks(path, statistic, field.name, "a number for each component")) from error
            spread = not statistic.startswith("mean")
            if values.size != len(field.channels) or not np.isfinite(values).all() or (spread and (values < 0).any()):
                raise UserError(_lacks(path, statistic, field.name, f"{len(field.channels)} finite numbers"))
            stats[statistic] |= dict(zip(field.channels, map(float, values), strict=True))
    return stats


def parse_stats(path: File) -> Any:
    """Return the plain values in a stats.yaml. UserError when it is no YAML.

    Aliases are allowed, for PyYAML writes them.
    """
    text = read_small(path)
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not a YAML file ({reason}); remove it to have the statistics computed") from error


def _leaves(value: object, depth: int = 0) -> Iterator[Any]:
    """The items of a number, a list of components or a 2 x 2 tensor: aliases make more of a few bytes than memory."""
    if not isinstance(value, list):
        yield value
        return
    if depth == 2 or len(value) > 4:
        raise TypeError("more than the components of a tensor")
    for item in value:
        yield from _leaves(item, depth + 1)


def _lacks(path: File, statistic: str, field: str, expected: str) -> str:
    return f"{path}: {statistic} of the field {field}: expected {expected}; remove the file to have them computed"

"""Moments per channel: pooled from parts, read from the Well's stats.yaml, or computed from the train files.

Statistics are {statistic: {channel: value}}: mean, std and rms of every channel, mean_delta, std_delta and rms_delta
(the change from one frame to the next) of the state channels. All are population moments, accumulated in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.registry import Card
from data_pipeline.schema import parse_yaml
from data_pipeline.well.hdf5 import WellFile, block_frames
from data_pipeline.well.layout import File, read_small

Stats = dict[str, dict[str, float]]
VALUE_STATISTICS = ("mean", "std", "rms")
SKIP_NONFINITE = ", or leave out the windows with `--skip nonfinite`"  # for messages of `data-pipeline shard` alone
DELTA_STATISTICS = ("mean_delta", "std_delta", "rms_delta")


@dataclass(frozen=True)
class Moments:
    """Number of values, mean and population variance; the last two are arrays of one shape, such as (C,)."""

    count: int
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, axes: Sequence[int]) -> "Moments":
        """Return the moments over some axes, in float64."""
        axes, exact = tuple(axes), values.astype(np.float64)
        count = math.prod(values.shape[axis] for axis in axes)
        if count == 0:
            zeros = np.zeros([size for axis, size in enumerate(values.shape) if axis not in axes])
            return cls(0, zeros, zeros)
        return cls(count, exact.mean(axis=axes), exact.var(axis=axes))

    @property
    def std(self) -> np.ndarray:
        """Standard deviation."""
        return np.sqrt(self.variance)

    @property
    def rms(self) -> np.ndarray:
        """Root mean square."""
        return np.sqrt(self.variance + self.mean**2)

    def by_channel(self, channels: Sequence[str], suffix: str = "") -> Stats:
        """Return mean, std and rms by channel; zeros if there were no values."""
        figures = {"mean": self.mean, "std": self.std, "rms": self.rms}
        return {
            statistic + suffix: dict(zip(channels, values.tolist(), strict=True))
            for statistic, values in figures.items()
        }


def pool(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all values behind `parts` together (Chan, Golub and LeVeque 1979)."""
    count = sum(part.count for part in parts)
    if count == 0:
        return parts[0]
    shares = [part.count / count for part in parts]
    mean = sum(share * part.mean for share, part in zip(shares, parts, strict=True))
    variance = sum(share * (part.variance + (part.mean - mean) ** 2) for share, part in zip(shares, parts, strict=True))
    return Moments(count, np.asarray(mean), np.asarray(variance))


def compute_stats(
    files: Sequence[File],
    card: Card,
    frames_per_chunk: int,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
    skip_nonfinite: bool = False,
) -> Stats:
    """Return the statistics of all trajectories in `files`, read at most `frames_per_chunk` frames at a time.

    UserError if there is no file, or if a field holds NaN or Inf; with `skip_nonfinite`, such frames and constant
    fields are left out.
    """
    if not files:
        raise UserError(f"{card.name}: no stats.yaml and no train files to compute it from; download one or the other")
    values, deltas, constants = [], [], []  # pooled after each trajectory, so that the lists stay short
    for path in files:
        with WellFile(path, card) as file:
            for trajectory in range(file.num_trajectories):
                for frames, changes in _blocks(file, trajectory, frames_per_chunk, skip_nonfinite):
                    values.append(_channel_moments(frames, skip_nonfinite))
                    deltas.append(_channel_moments(changes, skip_nonfinite))
                    on_bytes(frames.nbytes)
                constant = file.constants(trajectory)
                if not skip_nonfinite:
                    file.check_finite(constant, trajectory, None, SKIP_NONFINITE)
                constants.append(_channel_moments(constant[None], skip_nonfinite))
                values, deltas, constants = ([pool(parts)] for parts in (values, deltas, constants))
    stats = values[0].by_channel(card.state_channels) | deltas[0].by_channel(card.state_channels, "_delta")
    for statistic, of_constants in constants[0].by_channel(card.constant_channels).items():
        stats[statistic] |= of_constants
    return stats


def _blocks(
    file: WellFile, trajectory: int, frames_per_chunk: int, skip_nonfinite: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield some frames (T, C, H, W), and the changes that lead to them from the frames before."""
    last = np.empty((0, len(file.card.state_channels), *file.grid), np.float32)
    step = min(frames_per_chunk, block_frames(4 * len(file.card.state_channels) * file.grid[0] * file.grid[1]))
    for first in range(0, file.num_frames, step):
        frames = file.read(trajectory, first, min(first + step, file.num_frames))
        if not skip_nonfinite:
            file.check_finite(frames, trajectory, first, SKIP_NONFINITE)
        with np.errstate(invalid="ignore"):  # Inf - Inf, of frames that are left out
            change = np.diff(np.concatenate([last, frames]).astype(np.float64), axis=0)
        yield frames, change
        last = frames[-1:]


def _channel_moments(values: np.ndarray, skip_nonfinite: bool) -> Moments:
    """Return the moments of each channel of (T, C, H, W)."""
    if skip_nonfinite:
        values = values[np.isfinite(values).all(axis=(1, 2, 3))]
    return Moments.of(values, (0, 2, 3))


def read_stats(path: File, card: Card) -> Stats:
    """Read the Well's stats.yaml: {statistic: {field: number, or a list of components}}.

    UserError when it is no YAML, lacks a statistic or a field, or holds something else than finite numbers.
    """
    content = parse_stats(path)
    stats: Stats = {}
    for statistic in VALUE_STATISTICS + DELTA_STATISTICS:
        fields = card.fields if statistic in VALUE_STATISTICS else card.state
        stats[statistic] = {}
        for field in fields:
            try:
                values = np.array([float(value) for value in _leaves(content[statistic][field.name])])
            except (KeyError, TypeError, ValueError, OverflowError):
                values = np.empty(0)
            spread = not statistic.startswith("mean")
            if values.size != len(field.channels) or not np.isfinite(values).all() or (spread and (values < 0).any()):
                raise UserError(
                    f"{path}: {statistic} of the field {field.name}: expected {len(field.channels)} finite numbers, no "
                    "spread below 0; remove the file to have them computed"
                )
            stats[statistic] |= dict(zip(field.channels, map(float, values), strict=True))
    return stats


def parse_stats(path: File) -> Any:
    """Return the plain values in a stats.yaml. UserError when it is no YAML.

    Aliases are allowed, for PyYAML writes them.
    """
    return parse_yaml(read_small(path), str(path), aliases=True, hint="; remove it to have the statistics computed")


def _leaves(value: object, depth: int = 0) -> Iterator[Any]:
    """Yield the items of a number, a list of components or a 2 x 2 tensor, and no more.

    Aliases in YAML can make a few bytes into more items than memory holds.
    """
    if not isinstance(value, list):
        yield value
        return
    if depth == 2 or len(value) > 4:
        raise TypeError("more than the components of a tensor")
    for item in value:
        yield from _leaves(item, depth + 1)

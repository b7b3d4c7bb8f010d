"""Faults of simulation data, found in the frames as they are read.

The audit of a trajectory costs little beside the copy of it. Every value is looked at twice, for the lowest and highest
of each frame and channel, in which NaN and Inf show too. Sums use every 2nd, 4th or 8th point per axis, in float64.
What such a subsample cannot decide (equal frames, equal channels, still frames, a variance near zero) is decided on all
points. The summaries of all trajectories give the findings about a whole split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from data_pipeline.registry import Card, Channel
from data_pipeline.schema import Strict
from data_pipeline.well.findings import Finding, Range, frame_ranges
from data_pipeline.well.stats import Moments, Stats, pool

MIN_VARIANCE = 1e-6  # of a target over space, in squared physical units: ten times the eps of VRMSE (1e-7)
STILL_CHANGE = 1e-3  # of a channel's std, the most that any value of a still frame moves from the frame before
STILL_FRAMES = 10  # a stationary tail has at least this many
MIN_POINTS = 32  # the subsample keeps this many points per axis, where there are as many
MAX_STRIDE = 8
WARN_OFF = 0.1  # stats.yaml: mean off by so many std, or std by this share; few trajectories subsampled reach 0.06
ERROR_OFF = 1.0  # mean off by a whole std, or std by a factor of 2

_HUGE = float(np.finfo(np.float32).max)  # in place of infinity, which JSON has not

Interval = tuple[float | None, float | None]  # lowest, highest good value


class SummaryMoments(NamedTuple):
    """Moments of each channel over `num_frames` frames."""

    num_frames: int
    mean: tuple[float, ...]
    variance: tuple[float, ...]


@dataclass(frozen=True)
class Summary(Strict):
    """What some trajectories hold, for the findings about a whole split.

    Channels: state, then constant; the moments are those of the state channels, over the subsample.
    """

    lowest: tuple[float, ...]  # above `highest` where there was no finite frame
    highest: tuple[float, ...]
    equal: tuple[tuple[int, int], ...]  # pairs of channels that hold the same values everywhere
    static: tuple[int, ...]  # state channels whose frames are all equal to the first
    moments: SummaryMoments  # of the values
    delta_moments: SummaryMoments  # of the changes from one frame to the next


def merge(summaries: Sequence[Summary]) -> Summary:
    """Return the summary of all trajectories of several summaries, which have the same channels."""
    return Summary(
        tuple(map(min, zip(*(one.lowest for one in summaries), strict=True))),
        tuple(map(max, zip(*(one.highest for one in summaries), strict=True))),
        tuple(pair for pair in summaries[0].equal if all(pair in one.equal for one in summaries)),
        tuple(channel for channel in summaries[0].static if all(channel in one.static for one in summaries)),
        _pooled([one.moments for one in summaries]),
        _pooled([one.delta_moments for one in summaries]),
    )


def _pooled(parts: Sequence[SummaryMoments]) -> SummaryMoments:
    total = pool([Moments(count, np.array(mean), np.array(variance)) for count, mean, variance in parts])
    return SummaryMoments(total.count, tuple(total.mean.tolist()), tuple(total.variance.tolist()))


class TrajectoryAudit:
    """The audit of one trajectory, whose frames are added in their order.

    `state` and `constant` name the channels. `std` by channel is the unit of `stationary`; if it is None, the
    trajectory's own is. `ranges`: channel -> lowest and highest good value.
    """

    def __init__(
        self,
        state: Sequence[str],
        constant: Sequence[str],
        grid: tuple[int, int],
        std: Mapping[str, float] | None = None,
        ranges: Mapping[str, Interval] | None = None,
    ) -> None:
        self.state, self.constant, self.grid = tuple(state), tuple(constant), grid
        self.num_frames = 0
        self._std = None if std is None else np.array([std[name] for name in self.state])
        self._ranges = ranges or {}
        self._steps = tuple(slice(None, None, max(1, min(MAX_STRIDE, size // MIN_POINTS))) for size in grid)
        # Of each block that was added:
        self._low: list[np.ndarray] = []  # (T, C), as the next three
        self._high: list[np.ndarray] = []
        self._flat: list[np.ndarray] = []  # variance below MIN_VARIANCE
        self._change: list[np.ndarray] = []  # largest change of a point from the frame before; frame 0 has none
        self._sums: list[np.ndarray] = []  # (2, T, C): of value - origin and its square, over the subsample
        self._delta_sums: list[np.ndarray] = []  # (2, T, C): of the change and its square; frame 0 has none
        self._origin = np.empty(0)  # (C, 1), keeps the sums of squares accurate
        self._lowest = self._highest = np.full(len(self.state), np.nan)  # so far, without NaN
        self._duplicates: list[int] = []
        self._static = list(range(len(self.state)))  # channels that have not changed so far
        self._equal = list(combinations(range(len(self.state)), 2))
        self._last: np.ndarray | None = None
        self._last_points: np.ndarray | None = None  # (1, C, n)
        self._constants = np.empty((len(self.constant), 1, 1), np.float32)

    def add_constants(self, constants: np.ndarray) -> None:
        """Add the constant fields (K, H, W) float32."""
        self._constants = constants

    def add(self, frames: np.ndarray) -> None:
        """Add the next frames (T, C, H, W) float32, which must stay as they are until the next call ends."""
        flat = frames.reshape(*frames.shape[:2], -1)
        low, high = flat.min(axis=2), flat.max(axis=2)
        self._find_duplicates(frames, low, high)
        self._low.append(low)
        self._high.append(high)
        points = frames[:, :, self._steps[0], self._steps[1]].reshape(*frames.shape[:2], -1)
        with np.errstate(invalid="ignore", over="ignore"):
            variance = self._add_points(points.astype(np.float64))
            self._flat.append(_variance_is_tiny(frames, variance, points.shape[2], high.astype(np.float64) - low))
            self._measure_still_frames(frames)
        has_nan = bool(np.isnan(low).any())
        self._equal = [
            (a, b)
            for a, b in self._equal
            if np.array_equal(low[:, a], low[:, b], equal_nan=True)
            and np.array_equal(high[:, a], high[:, b], equal_nan=True)
            and all(np.array_equal(frame[a], frame[b], equal_nan=has_nan) for frame in frames)
        ]
        self.num_frames += len(frames)
        self._last = frames[-1]

    def _find_duplicates(self, frames: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Compare frames, and channels, with the frame before where lowest and highest values are the same."""
        extremes = np.concatenate([low, high], axis=1)
        joined = list(frames)
        if self._last is not None:
            last = np.concatenate([self._low[-1][-1:], self._high[-1][-1:]], axis=1)
            extremes = np.concatenate([last, extremes])
            joined.insert(0, self._last)
        same = extremes[1:] == extremes[:-1]  # (T, 2 C)
        still = same.reshape(len(same), 2, len(self.state)).all(axis=(0, 1))
        self._static = [
            channel
            for channel in self._static
            if still[channel] and all(np.array_equal(a[channel], b[channel]) for a, b in pairwise(joined))
        ]
        for place in np.flatnonzero(same.all(axis=1)).tolist():
            if np.array_equal(joined[place], joined[place + 1]):
                self._duplicates.append(self.num_frames + len(frames) - len(joined) + place + 1)

    def _add_points(self, points: np.ndarray) -> np.ndarray:
        """Add the subsample (T, C, n) float64, which is overwritten, to the sums; return its variances (T, C)."""
        if not self.num_frames:
            first = points[0].mean(axis=1, keepdims=True)
            self._origin = np.where(np.isfinite(first), first, 0.0)
        points -= self._origin
        sums = np.stack([points.sum(axis=2), np.einsum("tcn,tcn->tc", points, points)])
        self._sums.append(sums)
        joined = points if self._last_points is None else np.concatenate([self._last_points, points])
        change = np.diff(joined, axis=0)
        self._delta_sums.append(np.stack([change.sum(axis=2), np.einsum("tcn,tcn->tc", change, change)]))
        self._change.append(np.maximum(change.max(axis=2), -change.min(axis=2)))
        self._last_points = points[-1:]
        means = sums / points.shape[2]
        return np.asarray(means[1] - means[0] ** 2)

    def _measure_still_frames(self, frames: np.ndarray) -> None:
        """Take the change over all points where the subsample is still: something small may move between its points.

        Where no std was given it is known at the end only. Until then the range, at least twice the std, is the unit.
        """
        self._lowest = np.fmin(self._lowest, np.fmin.reduce(self._low[-1]))
        self._highest = np.fmax(self._highest, np.fmax.reduce(self._high[-1]))
        unit = self._highest - self._lowest if self._std is None else self._std
        change = self._change[-1]
        shift = len(frames) - len(change)
        for place in np.flatnonzero((change <= STILL_CHANGE * unit).all(axis=1)).tolist():
            frame = place + shift
            before = frames[frame - 1] if frame else self._last
            assert before is not None
            change[place] = np.abs(frames[frame] - before).max(axis=(1, 2))

    @property
    def finite(self) -> bool:
        """Whether the frames added last hold neither NaN nor Inf."""
        return bool(np.isfinite(self._low[-1]).all() and np.isfinite(self._high[-1]).all())

    def findings(self, file: str, trajectory: int) -> list[Finding]:
        """Return all findings about this trajectory, at most one for each kind and channel."""
        low, high = np.concatenate(self._low), np.concatenate(self._high)
        found = self._nonfinite(low, high) + self._duplicate() + self._stationary(low, high)
        found += self._zero_variance() + self._out_of_range(low, high)
        return [replace(finding, file=file, trajectory=trajectory) for finding in found]

    def _nonfinite(self, low: np.ndarray, high: np.ndarray) -> list[Finding]:
        found = []
        for number, name in enumerate(self.constant):
            if not np.isfinite(self._constants[number]).all():
                detail = "NaN or Inf in a constant field"
                found.append(_finding("nonfinite", "error", name, detail, ((0, len(low)),)))
        bad = ~(np.isfinite(low) & np.isfinite(high))
        for number, name in enumerate(self.state):
            frames = np.flatnonzero(bad[:, number]).tolist()
            if frames:
                detail = f"{len(frames)} of {len(low)} frames hold NaN or Inf"
                found.append(_finding("nonfinite", "error", name, detail, frame_ranges(frames)))
        return found

    def _duplicate(self) -> list[Finding]:
        if not self._duplicates:
            return []
        detail = f"{len(self._duplicates)} of {self.num_frames} frames equal the frame before"
        return [_finding("duplicates", "warning", None, detail, frame_ranges(self._duplicates))]

    def _stationary(self, low: np.ndarray, high: np.ndarray) -> list[Finding]:
        """Return the longest tail in which no value moves, by the largest change of each frame."""
        std = self._std
        if std is None:
            whole = (np.isfinite(low) & np.isfinite(high)).all(axis=1)
            std = np.sqrt(self._moments(self._sums, whole, self._origin).variance)
        moving = np.flatnonzero(~(np.concatenate(self._change) <= STILL_CHANGE * std).all(axis=1))
        first = int(moving[-1]) + 2 if len(moving) else 1
        count = len(low) - first
        if count < STILL_FRAMES:
            return []
        detail = f"the last {count} of {len(low)} frames move by less than {STILL_CHANGE:g} std from one to the next"
        return [_finding("stationary", "warning", None, detail, ((first, len(low)),))]

    def _zero_variance(self) -> list[Finding]:
        flat = np.concatenate(self._flat)
        found = []
        for number, name in enumerate(self.state):
            frames = np.flatnonzero(flat[:, number]).tolist()
            if frames:
                severity = "note" if frames == [0] else "warning"  # frame 0 is never the target of a one-step window
                detail = f"spatial variance below {MIN_VARIANCE:g} in {len(frames)} of {len(flat)} frames"
                found.append(_finding("zero_variance", severity, name, detail, frame_ranges(frames)))
        return found

    def _out_of_range(self, low: np.ndarray, high: np.ndarray) -> list[Finding]:
        found = []
        for name, (lowest, highest) in self._ranges.items():
            if name in self.state:
                lows, highs = low[:, self.state.index(name)], high[:, self.state.index(name)]
            elif name in self.constant:
                values = self._constants[self.constant.index(name)]
                lows, highs = values.min(keepdims=True)[0], values.max(keepdims=True)[0]
            else:
                continue
            outside = lows < (-np.inf if lowest is None else lowest)
            outside |= highs > (np.inf if highest is None else highest)
            if outside.any():
                bounds = ["any" if bound is None else f"{bound:g}" for bound in (lowest, highest)]
                got = f"values from {np.nanmin(lows):g} to {np.nanmax(highs):g}"
                detail = f"{got}, the card says {bounds[0]} to {bounds[1]}"
                frames = frame_ranges(np.flatnonzero(outside).tolist()) if name in self.state else ()
                found.append(_finding("out_of_range", "warning", name, detail, frames))
        return found

    def summary(self) -> Summary:
        """Return what the split's findings are made from; frames with NaN or Inf are left out."""
        low, high = np.concatenate(self._low), np.concatenate(self._high)
        good = np.isfinite(low) & np.isfinite(high)
        lowest, highest = np.where(good, low, _HUGE).min(axis=0), np.where(good, high, -_HUGE).max(axis=0)
        limits = [(one.min(), one.max()) if np.isfinite(one).all() else (_HUGE, -_HUGE) for one in self._constants]
        shift = len(self.state)
        equal_constants = [
            (shift + a, shift + b)
            for a, b in combinations(range(len(self.constant)), 2)
            if np.array_equal(self._constants[a], self._constants[b])
        ]
        whole = good.all(axis=1)
        return Summary(
            (*map(float, lowest), *(float(a) for a, _ in limits)),
            (*map(float, highest), *(float(b) for _, b in limits)),
            (*self._equal, *equal_constants),
            tuple(self._static),
            self._moments(self._sums, whole, self._origin),
            self._moments(self._delta_sums, whole[1:] & whole[:-1], 0.0),
        )

    def _moments(self, sums: Sequence[np.ndarray], chosen: np.ndarray, origin: np.ndarray | float) -> SummaryMoments:
        """Return the moments of the subsample of the chosen frames (T,)."""
        good = np.concatenate(sums, axis=1)[:, chosen]  # (2, frames, C)
        count, num_sampled = good.shape[1], max(1, self._last_points.shape[2] if self._last_points is not None else 1)
        mean, square = good.sum(axis=1) / max(1, count * num_sampled)
        variance = np.maximum(square - mean**2, 0)
        return SummaryMoments(count, tuple(map(float, mean + np.ravel(origin))), tuple(map(float, variance)))


def _variance_is_tiny(frames: np.ndarray, variance: np.ndarray, num_sampled: int, span: np.ndarray) -> np.ndarray:
    """Return which frames and channels have a variance below MIN_VARIANCE over space, (T, C) bool.

    The variance of the subsample is too high by at most the share of points it leaves out, so it tells which frames
    need all points. n values that span a range r have a variance of r^2 / 2n at least, and r^2 / 4 at most.
    """
    num_points = frames.shape[2] * frames.shape[3]
    tiny = span**2 < 4 * MIN_VARIANCE
    suspect = (variance < num_points / num_sampled * MIN_VARIANCE) & (span**2 < 2 * num_points * MIN_VARIANCE)
    for place, channel in np.argwhere(suspect & ~tiny):
        tiny[place, channel] = frames[place, channel].var(dtype=np.float64) < MIN_VARIANCE
    return np.asarray(tiny)


def _finding(kind: str, severity: str, channel: str | None, detail: str, frames: Sequence[Range] = ()) -> Finding:
    return Finding(kind, severity, "", None, channel, tuple(frames), detail)


def split_findings(
    card: Card,
    channels: Mapping[str, Channel],
    summary: Summary,
    lengths: Sequence[int],
    grid: tuple[int, int],
    stats: Stats | None,
) -> list[Finding]:
    """Return the findings about a whole split.

    `channels` are the registry's, which state the duplicates by definition; `lengths` the frames of each trajectory.
    `stats` are stated to be the statistics of these trajectories; None where nothing is stated.
    """
    found = []
    names = card.state_channels + card.constant_channels
    for number, name in enumerate(names):
        if summary.lowest[number] == summary.highest[number]:
            severity = "warning" if name in card.state_channels else "note"
            detail = f"{summary.lowest[number]:g} at every point of every frame"
            found.append(_finding("constant_channel", severity, name, detail))
    for number in summary.static if summary.delta_moments.num_frames else ():
        if summary.lowest[number] < summary.highest[number]:
            detail = "no value changes in time: store it as a constant field (time_varying False); scores leave it out"
            found.append(_finding("static_channel", "warning", names[number], detail))
    for a, b in summary.equal:
        if summary.lowest[a] >= summary.highest[a]:  # two constant channels are reported as such
            continue
        first, second = names[a], names[b]
        known = first == channels[second].duplicate_of or second == channels[first].duplicate_of
        detail = f"equals {first} at every point of every frame" + (", as channels.yaml says" if known else "")
        found.append(_finding("duplicated_channel", "note" if known else "warning", second, detail))
    if stats is not None and summary.moments.num_frames:
        # stats.yaml describes the published training split; `download --first-only` gets a part of it.
        published = sum(trajectories for trajectories, _ in card.train) if grid == card.grid else 0
        found += _stats_disagree(card, summary, stats, max(0, published - len(lengths)))
    if len(set(lengths)) > 1:
        counts = ", ".join(f"{lengths.count(length)} of {length}" for length in sorted(set(lengths)))
        found.append(_finding("mixed_lengths", "note", None, f"frames of the trajectories: {counts}"))
    if grid != card.grid:
        detail = f"{grid[0]}x{grid[1]}, the card says {card.grid[0]}x{card.grid[1]}"
        found.append(_finding("grid", "note", None, detail))
    return found


def _stats_disagree(card: Card, summary: Summary, stats: Stats, missing: int) -> list[Finding]:
    """Return one finding for each channel whose mean or std, or those of its change, are not those of the subsample.

    It is no error where trajectories are missing: the statistics are of all of them.
    """
    found = []
    moments = {"": summary.moments, "_delta": summary.delta_moments}
    for number, name in enumerate(card.state_channels):
        worst, details = 0.0, []
        for suffix, (count, means, variances) in moments.items():
            if not count:
                continue
            mean, std = means[number], float(np.sqrt(variances[number]))
            stated_mean, stated_std = stats["mean" + suffix][name], stats["std" + suffix][name]
            off = _distance(mean, std, stated_mean, stated_std)
            worst = max(worst, off)
            if off > WARN_OFF:
                stated = f"mean{suffix} {stated_mean:.4g} and std{suffix} {stated_std:.4g} stated"
                details.append(f"{stated}, {mean:.4g} and {std:.4g} in the data")
        if details:
            severity = "error" if worst > ERROR_OFF and not missing else "warning"
            why = f" ({missing} of the published trajectories are not here, which may be why)" if missing else ""
            found.append(_finding("stats_disagree", severity, name, "; ".join(details) + why))
    return found


def _distance(mean: float, std: float, stated_mean: float, stated_std: float) -> float:
    """Return how far stated moments are from the data's: shift / std or factor of the std - 1, the larger."""
    tiny = 1e-6 * max(abs(mean), abs(stated_mean)) + 1e-30  # what rounding makes of the std of a constant
    smaller, larger = sorted((std + tiny, stated_std + tiny))
    return max(abs(mean - stated_mean) / larger, larger / smaller - 1)

"""Findings: facts about data that a person should know before training, each with its place and severity.

`check`, `register`, `shard`, `audit` report the same. Those about values are made in shards/audit.py, while frames are
read; those about times, axes, files and copies are made here, from headers and checksums.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from data_pipeline.schema import Strict

KINDS = {  # in the order of reports
    "unreadable": "a file that cannot be read",
    "left_out": "files that are not read, by their names",
    "splits": "a split without files",
    "model_grid": "a grid that the models of this project cannot work on",
    "reader": "a file that the_well's WellDataset cannot open",
    "nonfinite": "NaN or Inf",
    "copy": "a trajectory that is there twice",
    "times": "times that do not go on evenly from frame to frame",
    "axes": "points of an axis that are uneven, run backward, or differ from file to file",
    "duplicates": "frames equal to the frame before",
    "stationary": "a tail that hardly changes any more",
    "zero_variance": "frames without spatial variance, on which VRMSE explodes",
    "constant_channel": "a channel with one value in the whole split",
    "static_channel": "a state channel that never changes in time",
    "duplicated_channel": "two channels with the same values",
    "out_of_range": "values outside the card's ranges",
    "stats_disagree": "stats.yaml and the data disagree",
    "mixed_lengths": "trajectories of several lengths",
    "grid": "another grid than the card's",
    "rounding": "the worst error of values stored as float16",
}
OF_HEADERS = ("left_out", "times", "axes")  # made from names and headers of HDF5 files, which shards do not hold
SEVERITIES = ("error", "warning", "note")
SKIPPABLE = ("nonfinite", "duplicates", "stationary")
MAX_LISTED = 5  # trajectories listed one by one for a kind and channel; more become one finding of the split
UNEVEN = 0.01  # of the mean step: a step off by more is uneven
_TEXTS = (".txt", ".md", ".json", ".yaml", ".yml", ".csv", ".log", ".sha256", ".md5", ".png", ".pdf")  # no data files

Range = tuple[int, int]  # frames [first, stop)


@dataclass(frozen=True)
class Finding(Strict):
    """One fact about the data."""

    kind: str  # a key of KINDS
    severity: str  # error: training on it goes wrong; warning: know it before you trust a score; note
    file: str  # name of the HDF5 file; "" for the whole split
    trajectory: int | None  # its index in that file
    channel: str | None
    frames: tuple[Range, ...]  # of the trajectory; none when the fact concerns the whole
    detail: str  # one line, with the figures

    @property
    def num_frames(self) -> int:
        """Number of frames concerned."""
        return sum(stop - first for first, stop in self.frames)

    @property
    def where(self) -> str:
        """File, trajectory, channel and frames, as far as known; a channel alone means the whole split."""
        parts = [self.file] if self.file else []
        if self.trajectory is not None:
            parts.append(f"trajectory {self.trajectory}")
        if self.channel is not None:
            parts.append(self.channel)
        if self.frames:
            shown = [str(first) if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in self.frames[:4]]
            word = "frame" if self.num_frames == 1 else "frames"
            parts.append(f"{word} {', '.join(shown)}{', ...' if len(self.frames) > 4 else ''}")
        return ", ".join(parts) or "whole split"


def frame_ranges(frames: Iterable[int], starts: Collection[int] = ()) -> tuple[Range, ...]:
    """Return ascending frame numbers as ranges: 3, 4, 5, 9 -> (3, 6), (9, 10). A frame in `starts` begins a range."""
    ranges: list[Range] = []
    for frame in frames:
        if ranges and ranges[-1][1] == frame and frame not in starts:
            ranges[-1] = (ranges[-1][0], frame + 1)
        else:
            ranges.append((frame, frame + 1))
    return tuple(ranges)


def condense(findings: Sequence[Finding], num_trajectories: int) -> list[Finding]:
    """Return a shorter report in the order of KINDS: one finding of the split for a fault of many trajectories.

    Kinds whose windows can be left out keep a finding for each trajectory. A channel that is constant in the whole
    split is not reported again for its variance.
    """
    constant = {finding.channel for finding in findings if finding.kind == "constant_channel"}
    kept = [one for one in findings if one.kind != "zero_variance" or one.channel not in constant]
    order = list(KINDS)
    kept.sort(key=lambda one: (order.index(one.kind), one.channel or "", one.severity))
    short: list[Finding] = []
    for (kind, channel, severity), group in groupby(kept, key=lambda one: (one.kind, one.channel, one.severity)):
        members = list(group)
        if kind in SKIPPABLE or len(members) <= MAX_LISTED:
            short += members
            continue
        frames = sorted({frame for one in members for first, stop in one.frames for frame in range(first, stop)})
        example = members[0]
        what = f"{len(members)} files"
        if example.trajectory is not None:
            what = f"{len(members)} of {num_trajectories} trajectories"
        detail = f"in {what}; the first: {example.where}: {example.detail}"
        short.append(Finding(kind, severity, "", None, channel, frame_ranges(frames), detail))
    return short


def even_step(points: np.ndarray) -> float | None:
    """Return the step of evenly spaced points (n,), negative where they descend; None for other points.

    Rounding to the type that holds all points is no unevenness, as of float32 times far from 0.
    """
    if len(points) < 2 or not np.isfinite(points).all():
        return None
    step = float(points[-1] - points[0]) / (len(points) - 1)
    slack = UNEVEN * abs(step) + _rounding(points)
    return step if step and (np.abs(np.diff(points) - step) <= slack).all() else None


def _rounding(points: np.ndarray) -> float:
    """Return what rounding may change the difference of two points by."""
    with np.errstate(over="ignore"):
        single = np.array_equal(points.astype(np.float32), points)
    return float(2 * np.finfo(np.float32 if single else np.float64).eps * np.abs(points).max())


def times_finding(times: np.ndarray, file: str, trajectory: int) -> Finding | None:
    """Return what is wrong with the times (T,) of a trajectory; None if they go on evenly."""
    step = even_step(times)
    if len(times) < 2 or (step is not None and step > 0):
        return None
    severity, detail, frames = _describe_times(times, step)
    return Finding("times", severity, file, trajectory, None, frame_ranges(frames), f"{detail}; dt is null")


def _describe_times(times: np.ndarray, step: float | None) -> tuple[str, str, list[int]]:
    """Return severity, words and the frames concerned."""
    steps = np.diff(times)
    if (steps == 0).all():
        return "warning", f"all {len(times)} frames are at time {times[0]:g}: were the times ever written?", []
    if (steps < 0).all():
        return "error", f"time runs backward, from {times[0]:g} to {times[-1]:g}: store the frames in order", []
    late = np.flatnonzero(times[1:] <= np.maximum.accumulate(times)[:-1]) + 1
    if late.size:
        what = f"{late.size} of {len(times)} frames are not later than one before them"
        return "error", f"{what} (overlap of a restarted run?): remove what is there twice", late.tolist()
    typical = float(np.median(steps))
    counts = np.round(steps / typical)
    if counts.min() == 1 and (np.abs(steps - counts * typical) <= UNEVEN * typical + _rounding(times)).all():
        missing = int(counts.sum()) - len(steps)
        what = f"{missing} frame{'s are' if missing > 1 else ' is'} missing before: the others are {typical:g} apart"
        return "warning", what, (np.flatnonzero(counts > 1) + 1).tolist()
    growth = times[2:] / times[1:-1] if times[1] > 0 else np.empty(0)
    if growth.size > 1 and np.ptp(growth) <= UNEVEN * (growth.mean() - 1):
        return "warning", f"time grows {growth.mean():.4g}-fold from frame to frame (logarithmic output)", []
    return "warning", f"frames are from {steps.min():.4g} to {steps.max():.4g} apart (adaptive steps?)", []


def axis_finding(axis: str, points: np.ndarray, file: str) -> Finding | None:
    """Return what is wrong with the points (n,) of an axis; None if they ascend evenly."""
    steps, step = np.diff(points), even_step(points)
    if len(points) < 2 or (step is not None and step > 0):
        return None
    ends, severity = f"from {points[0]:g} to {points[-1]:g}", "warning"
    if not np.isfinite(points).all():
        severity, detail = "error", f"points along {axis} are not finite"
    elif not ((steps > 0).all() or (steps < 0).all()):
        severity, detail = "error", f"points along {axis} do not ascend from one to the next ({ends})"
    else:
        backward = [f"{axis} runs backward, {ends}"] * bool(steps[0] < 0)
        apart = f"from {np.abs(steps).min():.4g} to {np.abs(steps).max():.4g} apart"
        uneven = [f"points along {axis} are not equally spaced ({apart}); the model takes them as if they were"]
        detail = "; ".join(backward + uneven * (step is None))
    return Finding("axes", severity, file, None, None, (), detail)


Spacing = tuple[float, float]  # from a grid point to the next along x and y; negative where the axis runs backward


def mean_spacing(x: np.ndarray, y: np.ndarray) -> Spacing | None:
    """Return the mean step along axes (X,) and (Y,); None where one has a single point, NaN, or ends where it began."""
    steps = [float(points[-1] - points[0]) / max(1, len(points) - 1) for points in (x, y)]
    return (steps[0], steps[1]) if np.isfinite(steps).all() and all(steps) else None


def same_spacing(one: Spacing | None, other: Spacing | None) -> bool:
    """Return whether two grids have the same spacing and direction, as far as both are known."""
    if one is None or other is None:
        return True
    return all(abs(a - b) <= UNEVEN * abs(a) for a, b in zip(one, other, strict=True))


def spacing_findings(found: Iterable[tuple[str, Spacing | None]]) -> Iterator[Finding]:
    """Yield a finding for each file (name, spacing) whose points are not spaced as in the first."""
    first, reference = "", None
    for file, spacing in found:
        if reference is None:
            first, reference = file, spacing
        elif spacing is not None and not same_spacing(reference, spacing):
            (x, y), (at_x, at_y) = spacing, reference
            detail = f"points are {x:.4g} (x) and {y:.4g} (y) apart, in {first} {at_x:.4g} and {at_y:.4g}"
            yield Finding("axes", "warning", file, None, None, (), detail)


@dataclass(frozen=True)
class StoredFrames:
    """A trajectory, and the checksum of each of its frames."""

    split: str
    file: str
    index: int
    crc32: str  # eight hex digits per frame

    @property
    def frames(self) -> list[str]:
        """The checksums one by one."""
        return [self.crc32[at : at + 8] for at in range(0, len(self.crc32), 8)]


def copies(trajectories: Sequence[StoredFrames]) -> list[tuple[str, Finding]]:
    """Return split and finding of each trajectory that is another's copy, or whose frames are all among another's."""
    holders: dict[str, list[int]] = defaultdict(list)  # checksum of a frame -> trajectories that hold it
    sets = [frozenset(one.frames) for one in trajectories]
    for number, held in enumerate(sets):
        for frame in held:
            holders[frame].append(number)
    found = []
    for number, one in enumerate(trajectories):
        for other in holders[one.crc32[-8:]] if len(one.crc32) > 8 else ():
            same = trajectories[other].crc32 == one.crc32
            inside = len(sets[number]) > 1 and sets[number] <= sets[other]
            first = other < number or len(sets[number]) < len(sets[other])  # of two that are alike, the later is told
            if first and other != number and (same or inside):
                source = trajectories[other]
                what = "the same frames as" if same else "frames that are all in"
                detail = f"{what} {source.split}, {source.file}, trajectory {source.index}; remove one of them"
                found.append((one.split, Finding("copy", "error", one.file, one.index, None, (), detail)))
                break
    return found


def left_out_findings(names: Sequence[str]) -> list[Finding]:
    """Return what says that the files and folders of these names are not read."""
    if not names:
        return []
    shown = [name if name.isprintable() else ascii(name) for name in names[:10]]
    listed = ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    severity = "note" if all(name.lower().endswith(_TEXTS) for name in names) else "warning"
    detail = f"not read: {listed}; files are read whose names end in .hdf5 or .h5, from data/train, valid and test"
    return [Finding("left_out", severity, "", None, None, (), detail)]

"""What can be wrong with simulation data, and which windows it costs.

A finding is a fact about frames of one trajectory, a trajectory, a channel or a whole split. By default findings are
reported and every window is kept, so that counts equal the published ones; three kinds can be left out on request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

KINDS = {  # in the order of reports
    "unreadable": "a file that cannot be read",
    "nonfinite": "NaN or Inf",
    "duplicates": "frames equal to the frame before",
    "stationary": "a tail that hardly changes any more",
    "zero_variance": "frames without spatial variance, on which VRMSE explodes",
    "constant_channel": "a channel with one value in the whole split",
    "duplicated_channel": "two channels with the same values",
    "out_of_range": "values outside the card's ranges",
    "stats_disagree": "stats.yaml and the data disagree",
    "mixed_lengths": "trajectories of several lengths",
    "grid": "another grid than the card's",
    "rounding": "the worst error of values stored as float16",
}
SEVERITIES = ("error", "warning", "note")
SKIPPABLE = ("nonfinite", "duplicates", "stationary")

Range = tuple[int, int]  # frames [first, stop)


@dataclass(frozen=True)
class Finding:
    """One fact; `frames` are ranges [first, stop) of the trajectory, none when it concerns the whole."""

    kind: str  # a key of KINDS
    severity: str  # error: training on it goes wrong; warning: know it before you trust a score; note
    file: str  # name of the HDF5 file; "" for the whole split
    trajectory: int | None  # its index in that file
    channel: str | None
    frames: tuple[Range, ...]
    detail: str  # one line, with the figures

    @property
    def num_frames(self) -> int:
        """Frames concerned."""
        return sum(stop - first for first, stop in self.frames)

    @property
    def where(self) -> str:
        """File, trajectory, channel and frames, as far as known; a channel alone is that of the whole split."""
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


def frame_ranges(frames: Sequence[int]) -> tuple[Range, ...]:
    """Ascending frame numbers as ranges: 3, 4, 5, 9 -> (3, 6), (9, 10)."""
    ranges: list[Range] = []
    for frame in frames:
        if ranges and ranges[-1][1] == frame:
            ranges[-1] = (ranges[-1][0], frame + 1)
        else:
            ranges.append((frame, frame + 1))
    return tuple(ranges)


def usable_segments(num_frames: int, findings: Sequence[Finding], skip: Sequence[str]) -> tuple[Range, ...]:
    """Where the windows of one trajectory may lie when findings of the kinds in `skip` are left out.

    A duplicate frame may not share a window with the frame before it; a stationary tail and frames with NaN or Inf are
    in no window. A window must lie inside one segment.
    """
    removed, starts = set[int](), {0}
    for finding in findings:
        if finding.kind not in skip:
            continue
        for first, stop in finding.frames:
            if finding.kind == "duplicates":
                starts.update(range(first, stop))
            else:
                removed.update(range(first, stop))
                starts.add(stop)
    segments: list[Range] = []
    for frame in range(num_frames):
        if frame in removed:
            continue
        if segments and segments[-1][1] == frame and frame not in starts:
            segments[-1] = (segments[-1][0], frame + 1)
        else:
            segments.append((frame, frame + 1))
    return tuple(segments)

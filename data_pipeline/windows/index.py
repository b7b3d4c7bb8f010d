"""Windows: `length` consecutive frames of one trajectory at stride 1, numbered trajectory by trajectory."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.shards.findings import Range


class WindowIndex:
    """Numbers all windows of `length` frames that lie inside one segment [first, stop) of a trajectory.

    `segments` holds those of each trajectory, usually one with all its frames; a segment shorter than a window has
    none. `shard_of_trajectory` does not decrease, so window ids are ordered by shard.
    """

    def __init__(self, segments: Sequence[Sequence[Range]], length: int, shard_of_trajectory: Sequence[int]) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1 frame, got {length}")
        shards = np.asarray(shard_of_trajectory, np.int64)
        if len(shards) != len(segments) or (np.diff(shards) < 0).any():
            raise ValueError("shard_of_trajectory: expected one shard for each trajectory, in ascending order")
        bounds = np.array([one for trajectory in segments for one in trajectory], np.int64).reshape(-1, 2)
        windows = np.maximum(bounds[:, 1] - bounds[:, 0] - length + 1, 0)
        counts = [len(trajectory) for trajectory in segments]
        self.length = length
        self._trajectories = np.repeat(np.arange(len(segments)), counts)  # (segments,)
        self._ends = np.cumsum(windows)
        self._shift = bounds[:, 0] - (self._ends - windows)  # window id -> first frame
        per_shard = np.bincount(np.repeat(shards, counts), weights=windows, minlength=int(shards.max(initial=-1)) + 1)
        self.shard_windows: tuple[int, ...] = tuple(per_shard.astype(np.int64).tolist())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, window_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Trajectory and first frame of each window: (B,) ids -> two (B,) int64 arrays. IndexError for a wrong id."""
        ids = np.asarray(window_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"window ids run from 0 to {len(self) - 1}, got {ids.min()} to {ids.max()}")
        segments = np.searchsorted(self._ends, ids, side="right")
        return self._trajectories[segments], ids + self._shift[segments]

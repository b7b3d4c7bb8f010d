"""Windows: `length` consecutive frames of one trajectory at stride 1, numbered trajectory by trajectory."""

from collections.abc import Sequence

import numpy as np


class WindowIndex:
    """Numbers all windows of `length` frames; a trajectory shorter than that has none.

    `shard_of_trajectory` does not decrease, so window ids are ordered by shard.
    """

    def __init__(self, frames_per_trajectory: Sequence[int], length: int, shard_of_trajectory: Sequence[int]) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1 frame, got {length}")
        shards = np.asarray(shard_of_trajectory, np.int64)
        if len(shards) != len(frames_per_trajectory) or (np.diff(shards) < 0).any():
            raise ValueError("shard_of_trajectory: expected one shard for each trajectory, in ascending order")
        windows = np.maximum(np.asarray(frames_per_trajectory, np.int64) - length + 1, 0)
        self.length = length
        self._ends = np.cumsum(windows)  # (trajectories,)
        self._starts = self._ends - windows
        per_shard = np.bincount(shards, weights=windows).astype(np.int64)
        self.shard_windows: tuple[int, ...] = tuple(per_shard.tolist())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, window_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Trajectory and first frame of each window: (B,) ids -> two (B,) int64 arrays. IndexError for a wrong id."""
        ids = np.asarray(window_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"window ids run from 0 to {len(self) - 1}, got {ids.min()} to {ids.max()}")
        trajectories = np.searchsorted(self._ends, ids, side="right")
        return trajectories, ids - self._starts[trajectories]

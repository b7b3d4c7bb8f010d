"""Reads windows straight out of memory-mapped shards."""

import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import UserError
from data_pipeline.index import WindowIndex
from data_pipeline.shards import MANIFEST_NAME, Manifest, check_shard, map_shard


class ShardReader:
    """Random access to the trajectories of one dataset and split.

    Opening checks the manifest and each shard's size; a shard is mapped when it is first read, once per process, so a
    reader may be pickled or forked at any time. With `verify`, each frame's checksum is compared as it is read.
    Raises UserError when a manifest or shard is missing, truncated, damaged or of another dataset.
    """

    def __init__(self, shards: Path, dataset: str, split: str, verify: bool = False) -> None:
        self.folder = Path(shards) / dataset / split
        self.verify = verify
        self.manifest = Manifest.load(self.folder / MANIFEST_NAME)
        if (self.manifest.dataset, self.manifest.split) != (dataset, split):
            raise UserError(
                f"{self.folder / MANIFEST_NAME}: expected dataset {dataset}, split {split}, "
                f"got {self.manifest.dataset}, {self.manifest.split}; move the folder to where it belongs"
            )
        for shard in self.manifest.shards:
            check_shard(self.folder / shard.name, shard.bytes)
        self._maps: dict[int, mmap.mmap] = {}
        self._indices: dict[int, WindowIndex] = {}

    @property
    def dataset(self) -> str:
        """The dataset's official name."""
        return self.manifest.dataset

    @property
    def num_trajectories(self) -> int:
        """Trajectories of this split."""
        return len(self.manifest.trajectories)

    def num_frames(self, trajectory: int) -> int:
        """Stored frames of one trajectory."""
        return self.manifest.trajectories[trajectory].frames

    def trajectory_frames(self, trajectory: int, first: int, length: int) -> np.ndarray:
        """Frames [first, first + length) of one trajectory: float32 (T, C, H, W), a copy. IndexError if not there."""
        out = np.empty((length, *self.manifest.frame_shape), np.float32)
        self._fill_frames(out, trajectory, first)
        return out

    def constants(self, trajectory: int) -> np.ndarray:
        """Constant fields of one trajectory: float32 (K, H, W), a copy; K may be 0."""
        out = np.empty((len(self.manifest.constant_channels), *self.manifest.grid), np.float32)
        self._fill_constants(out, trajectory)
        return out

    def index(self, length: int) -> WindowIndex:
        """All windows of `length` frames. Raises UserError if no trajectory is that long."""
        if length not in self._indices:
            trajectories = self.manifest.trajectories
            longest = max((b - a for one in trajectories for a, b in one.segments), default=0)
            if not 1 <= length <= longest:
                raise UserError(
                    f"{self.folder}: no window of {length} frames: the longest trajectory of {self.dataset} has "
                    f"{longest}; ask for shorter windows or leave the dataset out"
                )
            segments, shards = [one.segments for one in trajectories], [one.shard for one in trajectories]
            self._indices[length] = WindowIndex(segments, length, shards)
        return self._indices[length]

    def batch(self, window_ids: np.ndarray, length: int, draw: int = -1) -> Batch:
        """The windows with these ids of `index(length)`, as one batch; (B,) ids in any order, repeats allowed."""
        trajectories, firsts = self.index(length).locate(window_ids)
        manifest, count = self.manifest, len(trajectories)
        fields = torch.empty((count, length, *manifest.frame_shape), dtype=torch.float32)
        constants = torch.empty((count, len(manifest.constant_channels), *manifest.grid), dtype=torch.float32)
        for window, (trajectory, first) in enumerate(zip(trajectories.tolist(), firsts.tolist(), strict=True)):
            self._fill_frames(fields[window].numpy(), trajectory, first)
            self._fill_constants(constants[window].numpy(), trajectory)
        return Batch(self.dataset, fields, constants, torch.from_numpy(np.array(window_ids, np.int64)), draw)

    def _fill_frames(self, out: np.ndarray, trajectory: int, first: int) -> None:
        """Copies len(out) frames from `first` on into out (T, C, H, W): one slice per chunk that they touch."""
        record, per_chunk = self.manifest.trajectories[trajectory], self.manifest.frames_per_chunk
        stop = first + len(out)
        if not 0 <= first <= stop <= record.frames:
            raise IndexError(f"{self.folder}: trajectory {trajectory} has {record.frames} frames, not {first}:{stop}")
        frame = first
        while frame < stop:
            chunk, within = divmod(frame, per_chunk)
            count = min(per_chunk - within, stop - frame)
            offset = record.offsets[chunk] + within * self.manifest.frame_bytes
            self._copy(record.shard, offset, out[frame - first : frame - first + count])
            frame += count
        if self.verify:
            for position, values in enumerate(out):
                frame = first + position
                stored = record.crc32[8 * frame : 8 * frame + 8]
                self._check(values, stored, f"trajectory {trajectory}, frame {frame}", record.shard)

    def _fill_constants(self, out: np.ndarray, trajectory: int) -> None:
        record = self.manifest.trajectories[trajectory]
        if record.constants_offset is None:
            return
        self._copy(record.shard, record.constants_offset, out)
        if self.verify:
            self._check(out, record.constants_crc32, f"trajectory {trajectory}, constant fields", record.shard)

    def _copy(self, shard: int, offset: int, out: np.ndarray) -> None:
        if shard not in self._maps:
            record = self.manifest.shards[shard]
            self._maps[shard] = map_shard(self.folder / record.name, record.bytes)
        out.reshape(-1)[:] = np.frombuffer(self._maps[shard], "<f4", out.size, offset)

    def _check(self, values: np.ndarray, stored: str, what: str, shard: int) -> None:
        if f"{zlib.crc32(np.ascontiguousarray(values, '<f4').data):08x}" != stored:
            raise UserError(
                f"{self.folder / self.manifest.shards[shard].name}: damaged: {what}: the checksum is not the "
                "manifest's; run `data-pipeline verify` on the folder and copy or make the shard again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a map belongs to its process

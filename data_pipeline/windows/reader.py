"""Windows: `length` consecutive frames of one trajectory at stride 1, numbered trajectory by trajectory.

What the model is fed: windows of one dataset, in raw units.

Reads windows: one reader, whatever its bytes come from.

Local shards are memory-mapped here; streaming.py has the sources behind URLs.
"""

from __future__ import annotations

import copy
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data_pipeline.files import UserError
from data_pipeline.hashing import nested_choice
from data_pipeline.remote import RemoteFolder
from data_pipeline.shards.format import MANIFEST_NAME, Manifest, Range, trajectory_key
from data_pipeline.shards.tar import check_shard, map_shard


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


@dataclass(frozen=True)
class Batch:
    """B windows of T frames of one dataset, in its own channels and physical units."""

    dataset: str
    fields: torch.Tensor  # (B, T, C, H, W) float32
    constants: torch.Tensor  # (B, K, H, W) float32; K may be 0
    windows: torch.Tensor  # (B,) int64, the window ids
    draw: int = -1  # index of the schedule's draw; -1 if it came from none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        fields = self.fields.to(device, non_blocking=non_blocking)
        constants = self.constants.to(device, non_blocking=non_blocking)
        return replace(
            self, fields=fields, constants=constants, windows=self.windows.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return replace(
            self,
            fields=self.fields.pin_memory(),
            constants=self.constants.pin_memory(),
            windows=self.windows.pin_memory(),
        )


@dataclass
class Traffic:
    """What this process asked a server for, and what became of it; all zero for local shards."""

    requests: int = 0
    bytes_fetched: int = 0
    bytes_used: int = 0  # stored bytes that went into windows, wherever they came from


class ByteSource(ABC):
    """The bytes of one dataset and split. Nothing of the size that a manifest states is trusted before it is checked
    against the real file's: at the latest by `hold`, before memory is allocated.

    `windows` are given as trajectories and first frames, two lists of one length, and the number of frames of each.
    """

    folder: Path | RemoteFolder
    manifest: Manifest
    traffic: Traffic
    draws_ahead: int = 0  # how many draws ahead of their use windows should be announced

    def announce(self, trajectories: Sequence[int], firsts: Sequence[int], length: int) -> bool:
        """Windows that will be asked for soon. False if there is no room for them yet: announce them again later."""
        return True

    def forget(self) -> None:
        """What was announced will not be asked for."""
        return

    def hold(
        self, trajectories: Sequence[int], firsts: Sequence[int], length: int, constants: bool
    ) -> AbstractContextManager[None]:
        """Makes the windows' frames, and with `constants` their constant fields, readable within the block."""
        return _NOTHING

    @abstractmethod
    def read(self, shard: int, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a shard: frames or constant fields of a window that is held."""


_NOTHING = nullcontext()


class LocalShards(ByteSource):
    """Memory maps of the shards of a folder, each made when it is first read, once per process."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.manifest = Manifest.load(folder / MANIFEST_NAME)
        self.traffic = Traffic()
        for shard in self.manifest.shards:
            check_shard(folder / shard.name, shard.bytes)
        self._maps: dict[int, memoryview] = {}

    def read(self, shard: int, start: int, stop: int) -> memoryview:
        if shard not in self._maps:
            record = self.manifest.shards[shard]
            self._maps[shard] = memoryview(map_shard(self.folder / record.name, record.bytes))
        return self._maps[shard][start:stop]


class ShardReader:
    """Random access to the trajectories of one dataset and split, from a folder of shards or another source.

    Opening checks the manifest and, of local shards, the size. Threads may share a reader, and a fork's child may go on
    with it. With `verify`, each frame's checksum is compared as it is read (what comes over a network always is, once).
    Raises UserError when a manifest or shard is missing, truncated, damaged or of another dataset.
    """

    def __init__(self, shards: Path | ByteSource, dataset: str, split: str, verify: bool = False) -> None:
        self.source = shards if isinstance(shards, ByteSource) else LocalShards(Path(shards) / dataset / split)
        self.verify = verify
        self.manifest = self.source.manifest
        if (self.manifest.dataset, self.manifest.split) != (dataset, split):
            raise UserError(
                f"{self.folder}/{MANIFEST_NAME}: expected dataset {dataset}, split {split}, "
                f"got {self.manifest.dataset}, {self.manifest.split}; move the folder to where it belongs"
            )
        self._indices: dict[int, WindowIndex] = {}
        self._chosen: Sequence[int] = range(len(self.manifest.trajectories))  # trajectories that windows are of
        encoding = [self.manifest.encoding.get(name, (0.0, 1.0)) for name in self.manifest.state_channels]
        self._offsets, self._scales = np.array(encoding, np.float32).T.reshape(2, -1, 1, 1)  # (C, 1, 1) each

    @property
    def folder(self) -> Path | RemoteFolder:
        """Where the manifest and the shards lie."""
        return self.source.folder

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes of this process."""
        return self.source.traffic

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
        frames = self.num_frames(trajectory)
        if not 0 <= first <= first + length <= frames:
            raise IndexError(
                f"{self.folder}: trajectory {trajectory} has {frames} frames, not {first}:{first + length}"
            )
        with self.source.hold([trajectory], [first], length, constants=False):
            out = np.empty((length, *self.manifest.frame_shape), np.float32)
            self._fill_frames(out, trajectory, first)
        return out

    def constants(self, trajectory: int) -> np.ndarray:
        """Constant fields of one trajectory: float32 (K, H, W), a copy; K may be 0."""
        with self.source.hold([trajectory], [0], 0, constants=True):
            out = np.empty((len(self.manifest.constant_channels), *self.manifest.grid), np.float32)
            self._fill_constants(out, trajectory)
        return out

    def restricted_to(self, count: int) -> ShardReader:
        """This reader with the windows of `count` trajectories alone, the same as `data-pipeline shard --restrict`'s.

        Trajectories keep their numbers, and can all be read. Raises UserError where there are fewer.
        """
        manifest = self.manifest
        if not 1 <= count <= self.num_trajectories:
            raise UserError(
                f"{self.folder}: expected 1 to {self.num_trajectories} trajectories of {self.dataset}, as many as its "
                f"{manifest.split} split has, got {count}"
            )
        keys = [
            trajectory_key(self.dataset, manifest.split, manifest.sources[one.source].name, one.source_index)
            for one in manifest.trajectories
        ]
        restricted = copy.copy(self)
        restricted._chosen, restricted._indices = nested_choice(keys, count), {}
        return restricted

    def index(self, length: int) -> WindowIndex:
        """All windows of `length` frames. Raises UserError if none is that long."""
        if length not in self._indices:
            trajectories = self.manifest.trajectories
            longest = max((b - a for one in self._chosen for a, b in trajectories[one].segments), default=0)
            if not 1 <= length <= longest:
                raise UserError(
                    f"{self.folder}: no window of {length} frames: the longest stretch of frames of {self.dataset} has "
                    f"{longest}; ask for shorter windows or leave the dataset out"
                )
            shards = [one.shard for one in trajectories]
            segments: list[Sequence[Range]] = [() for _ in trajectories]
            for one in self._chosen:
                segments[one] = trajectories[one].segments
            self._indices[length] = WindowIndex(segments, length, shards)
        return self._indices[length]

    def announce(self, window_ids: np.ndarray, length: int) -> bool:
        """Tells that `batch` will be asked for these windows soon; False if there is no room for them yet."""
        trajectories, firsts = self.index(length).locate(window_ids)
        return self.source.announce(trajectories.tolist(), firsts.tolist(), length)

    def batch(self, window_ids: np.ndarray, length: int, draw: int = -1) -> Batch:
        """The windows with these ids of `index(length)`, as one batch; (B,) ids in any order, repeats allowed."""
        trajectories, firsts = (places.tolist() for places in self.index(length).locate(window_ids))
        manifest, count = self.manifest, len(trajectories)
        with self.source.hold(trajectories, firsts, length, constants=True):
            # numpy's memory, since numpy asks for huge pages: up to six times as fast to fill as torch's.
            fields = np.empty((count, length, *manifest.frame_shape), np.float32)
            constants = np.empty((count, len(manifest.constant_channels), *manifest.grid), np.float32)
            for window, (trajectory, first) in enumerate(zip(trajectories, firsts, strict=True)):
                self._fill_frames(fields[window], trajectory, first)
                self._fill_constants(constants[window], trajectory)
        ids = np.array(window_ids, np.int64)
        return Batch(self.dataset, torch.from_numpy(fields), torch.from_numpy(constants), torch.from_numpy(ids), draw)

    def _fill_frames(self, out: np.ndarray, trajectory: int, first: int) -> None:
        """Copies len(out) frames from `first` on into out (T, C, H, W): one slice per chunk that they touch."""
        record, per_chunk = self.manifest.trajectories[trajectory], self.manifest.frames_per_chunk
        frame, stop, frame_bytes = first, first + len(out), self.manifest.frame_bytes
        while frame < stop:
            chunk, within = divmod(frame, per_chunk)
            count = min(per_chunk - within, stop - frame)
            offset = record.offsets[chunk] + within * frame_bytes
            stored = self.source.read(record.shard, offset, offset + count * frame_bytes)
            if self.verify:
                self._check_frames(stored, trajectory, frame, count)
            self._decode(stored, out[frame - first : frame - first + count])
            frame += count

    def _decode(self, stored: memoryview, out: np.ndarray) -> None:
        """Stored frames into out (T, C, H, W) float32; float16 is value = stored * scale + offset."""
        if self.manifest.dtype == "float32":
            out.reshape(-1)[:] = np.frombuffer(stored, "<f4")
        else:
            np.multiply(np.frombuffer(stored, "<f2").reshape(out.shape), self._scales, out=out)
            out += self._offsets

    def _fill_constants(self, out: np.ndarray, trajectory: int) -> None:
        record = self.manifest.trajectories[trajectory]
        if record.constants_offset is None:
            return
        start = record.constants_offset
        stored = self.source.read(record.shard, start, start + self.manifest.constants_bytes)
        if self.verify:
            self._check(stored, record.constants_crc32, f"trajectory {trajectory}, constant fields", record.shard)
        out.reshape(-1)[:] = np.frombuffer(stored, "<f4")

    def _check_frames(self, stored: memoryview, trajectory: int, first: int, count: int) -> None:
        record, size = self.manifest.trajectories[trajectory], self.manifest.frame_bytes
        for position in range(count):
            frame, content = first + position, stored[position * size : (position + 1) * size]
            crc32 = record.crc32[8 * frame : 8 * frame + 8]
            self._check(content, crc32, f"trajectory {trajectory}, frame {frame}", record.shard)

    def _check(self, content: memoryview, crc32: str, what: str, shard: int) -> None:
        if f"{zlib.crc32(content):08x}" != crc32:
            raise UserError(
                f"{self.folder}/{self.manifest.shards[shard].name}: damaged: {what}: the checksum is not the "
                "manifest's; run `data-pipeline verify` on the folder and copy or make the shard again"
            )

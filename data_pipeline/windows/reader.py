"""Read windows: `length` consecutive frames of one trajectory at stride 1, as batches of one dataset.

`WindowIndex` numbers the windows of a dataset, a `Shards` object gives their stored bytes, and `ShardReader` makes a
`Batch` of them. `LocalShards` maps files of a folder into memory; streaming.py has the shards behind a URL.
"""

from __future__ import annotations

import copy
import mmap
import weakref
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.errors import UserError, open_files_limit
from data_pipeline.hashing import nested_choice
from data_pipeline.remote import RemoteFolder
from data_pipeline.shards.format import MANIFEST_NAME, Manifest, Range, trajectory_key
from data_pipeline.shards.tar import check_shard, map_shard

TIME_STEP = "dt"  # the name of the time between frames among a trajectory's scalars


class WindowIndex:
    """The numbers of all windows of `length` frames that lie inside one segment [first, stop) of a trajectory.

    `segments` holds the segments of each trajectory: usually one, with all its frames. A segment shorter than a window
    has no windows. `shard_of_trajectory` does not decrease, so window ids are ordered by shard.
    """

    def __init__(self, segments: Sequence[Sequence[Range]], length: int, shard_of_trajectory: Sequence[int]) -> None:
        shards = np.asarray(shard_of_trajectory, np.int64)
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
        """Return the trajectory and first frame of each window: (B,) ids -> two (B,) int64. IndexError for no id."""
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
    # name -> (B,) float64 on the CPU: numbers of the windows' trajectories, as `ShardReader.scalars` returns them
    scalars: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the same batch with its fields on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory, from which a GPU copies while it computes."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(self, fields=move(self.fields), constants=move(self.constants), windows=move(self.windows))


@dataclass
class Traffic:
    """The requests and bytes of this process; all zero for local shards."""

    requests: int = 0
    bytes_fetched: int = 0
    bytes_used: int = 0  # stored bytes that went into windows, from the server or from the cache


class WindowPlaces(NamedTuple):
    """Windows of one length by their place; frames [first, first + length) of a trajectory are one window."""

    trajectories: tuple[int, ...]
    firsts: tuple[int, ...]
    length: int


class ShardMaps:
    """The memory maps of all shards that this process reads; of too many, the least recently used one is dropped.

    A map keeps its file open (before Python 3.13), and many systems let a process open fewer files than The Well has
    shards. Threads share the maps without a lock, since each method of an OrderedDict is atomic and since a forked
    process could inherit a lock that is never released. A map that is dropped while it is read stays until then.
    """

    def __init__(self) -> None:
        self._maps: OrderedDict[tuple[int, int], memoryview] = OrderedDict()  # (id of the Shards, shard) -> its bytes

    @cached_property
    def most(self) -> int:
        """The number of maps that are kept: a quarter of the files that this process may open."""
        return max(open_files_limit() // 4, 1)

    def get(self, owner: int, shard: int, make: Callable[[], mmap.mmap]) -> memoryview:
        """Return the bytes of a shard, which `make` maps if it is not mapped."""
        key = owner, shard
        try:
            self._maps.move_to_end(key)
            return self._maps[key]
        except KeyError:
            content = self._maps[key] = memoryview(make())
        while len(self._maps) > self.most:
            self._maps.popitem(last=False)
        return content

    def drop(self, owner: int) -> None:
        """Drop all maps of some shards."""
        for key in tuple(self._maps):
            if key[0] == owner:
                self._maps.pop(key, None)


class Shards(ABC):
    """The stored bytes of one dataset and split.

    Sizes that the manifest states are compared with the real files at the latest by `hold`, before memory is allocated.
    """

    maps = ShardMaps()  # of all instances
    folder: Path | RemoteFolder
    draws_ahead: int = 0  # number of draws whose windows should be prefetched

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.traffic = manifest, Traffic()
        weakref.finalize(self, self.maps.drop, id(self))

    def prefetch(self, windows: WindowPlaces) -> bool:
        """Start to fetch windows that will be held soon. Return False if there is no room for them yet."""
        return True

    def cancel_prefetch(self) -> None:
        """Drop all windows that were prefetched and not held yet."""
        return

    def hold(self, windows: WindowPlaces, constants: bool) -> AbstractContextManager[None]:
        """Make the windows' frames, and with `constants` their constant fields, readable within the block."""
        return nullcontext()

    @abstractmethod
    def read(self, shard: int, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of a shard: frames or constant fields of a window that is held."""


class LocalShards(Shards):
    """Memory maps of the shards of a folder, each made when it is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Manifest.load(folder / MANIFEST_NAME))
        self.folder: Path = folder
        for shard in self.manifest.shards:
            check_shard(folder / shard.name, shard.bytes)

    def read(self, shard: int, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of a shard."""
        record = self.manifest.shards[shard]
        return self.maps.get(id(self), shard, lambda: map_shard(self.folder / record.name, record.bytes))[start:stop]


class ShardReader:
    """Random access to the trajectories of one dataset and split, from a folder of shards or a URL.

    Opening checks the manifest and, of local shards, the size. Threads may share a reader, and a forked process may
    continue to use it. With `verify`, each frame's checksum is compared when it is read (of shards behind a URL, it
    always is). Raises UserError when a manifest or shard is missing, truncated, damaged or of another dataset.
    """

    def __init__(self, shards: Path | Shards, dataset: str, split: str, verify: bool = False) -> None:
        self.shards = shards if isinstance(shards, Shards) else LocalShards(Path(shards) / dataset / split)
        self.verify = verify
        self.manifest = self.shards.manifest
        if (self.manifest.dataset, self.manifest.split) != (dataset, split):
            raise UserError(
                f"{self.folder}/{MANIFEST_NAME}: expected dataset {dataset}, split {split}, "
                f"got {self.manifest.dataset}, {self.manifest.split}; move the folder to where it belongs"
            )
        self._indices: dict[int, WindowIndex] = {}
        self._chosen: Sequence[int] = range(len(self.manifest.trajectories))  # trajectories that have windows
        encoding = [self.manifest.encoding.get(name, (0.0, 1.0)) for name in self.manifest.state_channels]
        self._offsets, self._scales = np.array(encoding, np.float32).T.reshape(2, -1, 1, 1)  # (C, 1, 1) each

    @property
    def folder(self) -> Path | RemoteFolder:
        """The folder of the manifest and the shards."""
        return self.shards.folder

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes of this process."""
        return self.shards.traffic

    @property
    def dataset(self) -> str:
        """The dataset's official name."""
        return self.manifest.dataset

    @property
    def num_trajectories(self) -> int:
        """Trajectories of this split."""
        return len(self.manifest.trajectories)

    def num_frames(self, trajectory: int) -> int:
        """Return the number of stored frames of one trajectory."""
        return self.manifest.trajectories[trajectory].frames

    def restricted_to(self, count: int) -> ShardReader:
        """Return this reader with windows of only `count` trajectories, those of `data-pipeline shard --restrict`.

        Trajectories keep their numbers, and all of them can be read. Raises UserError where there are fewer.
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
        """Return the index of all windows of `length` frames. Raises UserError if no segment is that long."""
        if length not in self._indices:
            trajectories = self.manifest.trajectories
            segments: list[Sequence[Range]] = [() for _ in trajectories]
            for one in self._chosen:
                segments[one] = trajectories[one].segments
            longest = max((stop - first for some in segments for first, stop in some), default=0)
            if not 1 <= length <= longest:
                raise UserError(
                    f"{self.folder}: no window of {length} frames: the longest stretch of frames of {self.dataset} has "
                    f"{longest}; ask for shorter windows or leave the dataset out"
                )
            self._indices[length] = WindowIndex(segments, length, [one.shard for one in trajectories])
        return self._indices[length]

    def _windows(self, window_ids: np.ndarray, length: int) -> WindowPlaces:
        trajectories, firsts = self.index(length).locate(window_ids)
        return WindowPlaces(tuple(trajectories.tolist()), tuple(firsts.tolist()), length)

    def prefetch(self, window_ids: np.ndarray, length: int) -> bool:
        """Start to fetch windows for a later `batch`. Return False if there is no room for them yet."""
        return self.shards.prefetch(self._windows(window_ids, length))

    def batch(self, window_ids: np.ndarray, length: int, draw: int = -1) -> Batch:
        """Return the windows with these ids of `index(length)`; (B,) ids in any order, repeats allowed."""
        windows, manifest = self._windows(window_ids, length), self.manifest
        with self.shards.hold(windows, constants=True):
            # numpy allocates the memory, since numpy asks for huge pages: up to six times as fast to fill as torch's.
            fields = np.empty((len(window_ids), length, *manifest.frame_shape), np.float32)
            constants = np.empty((len(window_ids), len(manifest.constant_channels), *manifest.grid), np.float32)
            for place, (trajectory, first) in enumerate(zip(windows.trajectories, windows.firsts, strict=True)):
                self._fill_frames(fields[place], trajectory, first)
                self._fill_constants(constants[place], trajectory)
        ids = torch.from_numpy(np.array(window_ids, np.int64))
        scalars = {name: torch.from_numpy(values) for name, values in self.scalars(windows.trajectories).items()}
        return Batch(self.dataset, torch.from_numpy(fields), torch.from_numpy(constants), ids, draw, scalars)

    @cached_property
    def _scalars(self) -> dict[str, np.ndarray]:
        every = [{TIME_STEP: one.dt, **one.scalars} for one in self.manifest.trajectories]
        names = sorted({name for one in every for name in one})
        return {name: np.array([one.get(name) for one in every], np.float64) for name in names}  # None becomes NaN

    def scalars(self, trajectories: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Return the constant scalars of trajectories, None for all, by name: (n,) float64, NaN where one has none.

        `dt`, the time between frames, is one of them.
        """
        chosen = slice(None) if trajectories is None else list(trajectories)
        return {name: values[chosen] for name, values in self._scalars.items()}

    def trajectory_frames(self, trajectory: int, first: int, length: int) -> np.ndarray:
        """Return a copy of frames [first, first + length) of a trajectory, (T, C, H, W) float32.

        IndexError if the trajectory does not have them all.
        """
        frames = self.num_frames(trajectory)
        if not 0 <= first <= first + length <= frames:
            raise IndexError(
                f"{self.folder}: trajectory {trajectory} has {frames} frames, not {first}:{first + length}"
            )
        with self.shards.hold(WindowPlaces((trajectory,), (first,), length), constants=False):
            out = np.empty((length, *self.manifest.frame_shape), np.float32)
            self._fill_frames(out, trajectory, first)
        return out

    def constants(self, trajectory: int) -> np.ndarray:
        """Return a copy of the constant fields of a trajectory, (K, H, W) float32; K may be 0."""
        with self.shards.hold(WindowPlaces((trajectory,), (0,), 0), constants=True):
            out = np.empty((len(self.manifest.constant_channels), *self.manifest.grid), np.float32)
            self._fill_constants(out, trajectory)
        return out

    def _fill_frames(self, out: np.ndarray, trajectory: int, first: int) -> None:
        """Copy len(out) frames from `first` on into out (T, C, H, W): one slice per chunk that they touch."""
        manifest, record = self.manifest, self.manifest.trajectories[trajectory]
        frame, stop, size = first, first + len(out), manifest.frame_bytes
        while frame < stop:
            chunk, within = divmod(frame, manifest.frames_per_chunk)
            count = min(manifest.frames_per_chunk - within, stop - frame)
            offset = record.offsets[chunk] + within * size
            stored = self.shards.read(record.shard, offset, offset + count * size)
            for place in range(count if self.verify else 0):
                number = frame + place
                crc32 = record.crc32[8 * number : 8 * number + 8]
                content = stored[place * size : (place + 1) * size]
                self._check(content, crc32, f"trajectory {trajectory}, frame {number}", record.shard)
            values = out[frame - first : frame - first + count]
            if manifest.dtype == "float32":
                values.reshape(-1)[:] = np.frombuffer(stored, "<f4")
            else:  # float16: value = stored * scale + offset
                np.multiply(np.frombuffer(stored, "<f2").reshape(values.shape), self._scales, out=values)
                values += self._offsets
            frame += count

    def _fill_constants(self, out: np.ndarray, trajectory: int) -> None:
        record = self.manifest.trajectories[trajectory]
        if record.constants_offset is None:
            return
        start = record.constants_offset
        stored = self.shards.read(record.shard, start, start + self.manifest.constants_bytes)
        if self.verify:
            self._check(stored, record.constants_crc32, f"trajectory {trajectory}, constant fields", record.shard)
        out.reshape(-1)[:] = np.frombuffer(stored, "<f4")

    def _check(self, content: memoryview, crc32: str, what: str, shard: int) -> None:
        if f"{zlib.crc32(content):08x}" != crc32:
            raise UserError(
                f"{self.folder}/{self.manifest.shards[shard].name}: damaged: {what}: the checksum is not the "
                "manifest's; run `data-pipeline verify` on the folder and copy or make the shard again"
            )

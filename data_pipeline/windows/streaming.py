"""Shards behind a URL, fetched ahead of the schedule.

The loader calls `prefetch` with the windows of the draws to come. The threads of a `Fetcher` fetch their bytes while
earlier batches are used. There are two ways, and one of them serves all datasets of a run:

    shuffle: global    RangeShards    the frames of windows as byte ranges, neighbors in one request
    shuffle: blocks    WholeShards    whole shards through the cache on disk, mapped into memory like local ones

Frames are compared with the manifest's checksums when they arrive and when they are read back from the cache, whole
shards with their SHA-256. How, and how fast, bytes arrive changes no batch.
"""

import mmap
import os
import threading
import zlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFile, RemoteFolder, Retries
from data_pipeline.shards.format import MANIFEST_NAME, Manifest
from data_pipeline.shards.tar import map_and_close
from data_pipeline.windows.cache import BlobCache
from data_pipeline.windows.reader import Shards, Traffic, WindowPlaces
from data_pipeline.workers import Threads

THREADS = 8  # requests in flight, per process; of whole shards half as many
GAP_BYTES = 256 * 1024  # two ranges closer than this are one request: less than what a round trip costs
REQUEST_BYTES = 16 * 2**20  # a request that grew to this takes no further range
HELD_BYTES = 256 * 2**20  # of the ranges of prefetched draws, per process


@dataclass(frozen=True)
class StreamSettings:
    """How shards behind a URL are read."""

    shuffle: str = "global"  # the schedule's; global: ranges, blocks: whole shards
    shards_per_block: int = 4  # the schedule's, for blocks
    cache: Path | None = None  # folder; None: default_cache()
    cache_bytes: int = 40 * 10**9  # limit; 0: none, for global only
    draws_ahead: int = 64  # draws whose windows are prefetched
    retries: Retries = field(default_factory=Retries)


def default_cache() -> Path:
    """Return $XDG_CACHE_HOME/wavelit, where the variable's default is ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wavelit"


def open_remote_shards(folders: Mapping[str, RemoteFolder], settings: StreamSettings) -> "Mapping[str, RemoteShards]":
    """Return the shards in the folder of each dataset's split, by name; they share threads, memory and the cache.

    Raises UserError if a manifest is missing or damaged, or if the cache cannot hold a block of shards of each dataset.
    """
    cache, ahead = BlobCache(settings.cache or default_cache(), settings.cache_bytes), settings.draws_ahead
    if settings.shuffle == "global":
        fetcher, some = Fetcher(THREADS, HELD_BYTES), cache if settings.cache_bytes else None
        return {name: RangeShards(folder, fetcher, some, ahead) for name, folder in folders.items()}
    fetcher = Fetcher(THREADS // 2, cache.limit_bytes)
    opened = {name: WholeShards(folder, fetcher, cache, ahead) for name, folder in folders.items()}
    needed = {  # bytes of the largest block of each dataset
        name: sum(nlargest(settings.shards_per_block, (shard.bytes for shard in shards.manifest.shards)))
        for name, shards in opened.items()
    }
    total = sum(needed.values())
    if total > cache.limit_bytes:
        each = ", ".join(f"{name} {num_bytes / 1e9:.3g}" for name, num_bytes in needed.items())
        raise UserError(
            f"{cache.folder}: the cache may hold {cache.limit_bytes / 1e9:.3g} GB, but one block of "
            f"{settings.shards_per_block} shards of each dataset has {total / 1e9:.3g} GB ({each}): raise "
            "data.cache_gb (twice that has room for the next blocks), lower sampling.shards_per_block, or leave "
            "datasets out"
        )
    return opened


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, stop) of a shard with a checksum: a frame, constant fields of a trajectory, or a whole shard."""

    shards: "RemoteShards"
    shard: int
    start: int
    stop: int
    crc32: str = field(default="", compare=False)


@dataclass(eq=False)
class Request:
    """Ranges of one shard that are fetched together."""

    ranges: list[ByteRange]
    start: int
    stop: int
    cached: bool = False  # the cache had it when the request was made
    users: int = 0  # windows held or prefetched that need it
    content: "Future[memoryview]" = field(default_factory=Future)

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of the shard, when they have arrived."""
        return self.content.result()[start - self.start : stop - self.start]


class Fetcher:
    """Threads that fetch ranges for several datasets. What they fetched is kept while a draw needs it.

    A fetcher belongs to one process. A forked process starts with an empty one: its copies of the parent's locks would
    never be released, and threads do not survive a fork.
    """

    def __init__(self, num_threads: int, limit_bytes: int) -> None:
        self._num_threads, self._limit_bytes = num_threads, limit_bytes
        self._reset()

    def _reset(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._threads: Threads | None = None
        self.held: dict[ByteRange, Request] = {}
        self.held_bytes = 0
        self._prefetched: OrderedDict[object, list[Request]] = OrderedDict()  # in the order of the schedule

    @property
    def lock(self) -> threading.Lock:
        """The lock for all that is held. Every method takes it first, which resets the fetcher in a forked process."""
        if self._process != os.getpid():
            self._reset()
        return self._lock

    def prefetch(self, shards: "RemoteShards", windows: WindowPlaces) -> bool:
        """Start to fetch windows that will be held later. Return False if there is no room for them yet."""
        needed = shards.needed(windows, constants=True)
        with self.lock:
            if (shards, windows) not in self._prefetched:
                num_bytes = sum(one.stop - one.start for one in needed if one not in self.held)
                if self._prefetched and self.held_bytes + num_bytes > self._limit_bytes:
                    return False
                self._prefetched[shards, windows] = self._request(shards, needed)
        return True

    @contextmanager
    def hold(self, shards: "RemoteShards", windows: WindowPlaces, constants: bool) -> Iterator[None]:
        """Wait for the bytes of windows and keep them within the block. Draws prefetched before these are dropped."""
        needed = shards.needed(windows, constants)
        with self.lock:
            requests = None
            while requests is None and (shards, windows) in self._prefetched:
                key, prefetched = self._prefetched.popitem(last=False)
                if key == (shards, windows):
                    requests = prefetched
                else:
                    self._release(prefetched)
            if requests is None:
                requests = self._request(shards, needed)
        try:
            for request in requests:
                request.content.result()
            yield
        finally:
            with self.lock:
                self._release(requests)

    def cancel_prefetch(self) -> None:
        """Drop all that was prefetched and not held yet. Downloads that have begun go on."""
        with self.lock:
            while self._prefetched:
                self._release(self._prefetched.popitem()[1])

    def _request(self, shards: "RemoteShards", needed: set[ByteRange]) -> list[Request]:
        """Return the request of each range, with one more user; submit requests for ranges that have none."""
        missing = set()
        for one in needed:
            held = self.held.get(one)
            if held is None or (held.content.done() and held.content.exception() is not None):
                missing.add(one)
        for request in shards.requests(missing) if missing else ():
            self._threads = self._threads or Threads(self._num_threads)
            self.held |= dict.fromkeys(request.ranges, request)
            self.held_bytes += request.stop - request.start
            request.content = self._threads.submit(shards.load, request)
        requests = [self.held[one] for one in needed]
        for request in requests:
            request.users += 1
        return requests

    def _release(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.users -= 1
            if request.users == 0:
                for one in request.ranges:
                    if self.held.get(one) is request:
                        del self.held[one]
                self.held_bytes -= request.stop - request.start
                request.content.cancel()

    def count(self, traffic: Traffic, requests: int = 0, fetched: int = 0, used: int = 0) -> None:
        """Add to the traffic of a dataset."""
        with self.lock:
            traffic.requests += requests
            traffic.bytes_fetched += fetched
            traffic.bytes_used += used


class RemoteShards(Shards):
    """The shards of one dataset and split behind a URL."""

    def __init__(self, folder: RemoteFolder, fetcher: Fetcher, cache: BlobCache | None, draws_ahead: int) -> None:
        super().__init__(Manifest.load(folder.file(MANIFEST_NAME)))
        self.folder: RemoteFolder = folder
        self.draws_ahead = draws_ahead
        self._fetcher, self._cache = fetcher, cache
        self._sizes_checked: set[int] = set()

    def prefetch(self, windows: WindowPlaces) -> bool:
        """Start to fetch windows that will be held soon. Return False if there is no room for them yet."""
        return self._fetcher.prefetch(self, windows)

    def cancel_prefetch(self) -> None:
        """Drop what was prefetched and not held yet, of all datasets of the fetcher."""
        self._fetcher.cancel_prefetch()

    def hold(self, windows: WindowPlaces, constants: bool) -> AbstractContextManager[None]:
        """Make the windows' frames, and with `constants` their constant fields, readable within the block."""
        stored = windows.length * self.manifest.frame_bytes + constants * self.manifest.constants_bytes
        self._fetcher.count(self.traffic, used=len(windows.trajectories) * stored)
        return self._fetcher.hold(self, windows, constants)

    def file(self, shard: int) -> RemoteFile:
        """Return a shard's file. UserError if its size is not the one in the manifest."""
        record = self.manifest.shards[shard]
        file = self.folder.file(record.name)
        if shard not in self._sizes_checked:
            self._fetcher.count(self.traffic, requests=1)
            size = file.size()
            if size != record.bytes:
                raise UserError(
                    f"{file}: expected a shard of {record.bytes} bytes, the server "
                    f"{'does not tell its size' if size is None else f'has {size}'}; upload it again"
                )
            self._sizes_checked.add(shard)
        return file

    @abstractmethod
    def needed(self, windows: WindowPlaces, constants: bool) -> set[ByteRange]:
        """Return the ranges that `read` needs for these windows."""

    @abstractmethod
    def requests(self, ranges: set[ByteRange]) -> list[Request]:
        """Return the requests for some ranges. The fetcher's lock is held."""

    @abstractmethod
    def load(self, request: Request) -> memoryview:
        """Return the bytes of a request, from the cache or the server; runs in a thread."""


class RangeShards(RemoteShards):
    """Frames as byte ranges, for `shuffle: global` and for reading a few windows."""

    def needed(self, windows: WindowPlaces, constants: bool) -> set[ByteRange]:
        """Return the range of each frame, and of the constant fields."""
        manifest, needed = self.manifest, set()
        for trajectory, first in zip(windows.trajectories, windows.firsts, strict=True):
            record = manifest.trajectories[trajectory]
            for frame in range(first, first + windows.length):
                chunk, within = divmod(frame, manifest.frames_per_chunk)
                start = record.offsets[chunk] + within * manifest.frame_bytes
                crc32 = record.crc32[8 * frame : 8 * frame + 8]
                needed.add(ByteRange(self, record.shard, start, start + manifest.frame_bytes, crc32))
            if constants and record.constants_offset is not None:
                start, stop = record.constants_offset, record.constants_offset + manifest.constants_bytes
                needed.add(ByteRange(self, record.shard, start, stop, record.constants_crc32))
        return needed

    def requests(self, ranges: set[ByteRange]) -> list[Request]:
        """Return a request for each range in the cache, and few for the others: close neighbors go together."""
        requests: list[Request] = []
        last: Request | None = None
        for one in sorted(ranges, key=lambda one: (one.shard, one.start, one.stop)):
            if self._cache is not None and self._cache.has(self._blob(one)):
                requests.append(Request([one], one.start, one.stop, cached=True))
            elif (
                last is not None
                and last.ranges[0].shard == one.shard
                and one.start - last.stop <= GAP_BYTES
                and one.stop - last.start <= REQUEST_BYTES
            ):
                last.ranges.append(one)
                last.stop = max(last.stop, one.stop)
            else:
                last = Request([one], one.start, one.stop)
                requests.append(last)
        return requests

    def load(self, request: Request) -> memoryview:
        """Return the bytes of a request, after their checksums were compared."""
        cache, first = self._cache, request.ranges[0]
        if request.cached and cache is not None:
            stored = cache.read(self._blob(first), first.stop - first.start)
            if stored is not None and f"{zlib.crc32(stored):08x}" == first.crc32:
                return memoryview(stored)
            cache.remove(self._blob(first))  # torn or damaged: the server has it

        def damage(content: bytes) -> str | None:
            self._fetcher.count(self.traffic, requests=1, fetched=len(content))
            for one in request.ranges:
                part = memoryview(content)[one.start - request.start : one.stop - request.start]
                if f"{zlib.crc32(part):08x}" != one.crc32:
                    return (
                        f"bytes {one.start} to {one.stop} came with another checksum than the manifest's, damaged on "
                        "their way or in the shard (`data-pipeline verify` on that folder compares it)"
                    )
            return None

        content = memoryview(self.file(first.shard).read_range(request.start, request.stop, damage))
        if cache is not None:
            for one in request.ranges:
                cache.put(self._blob(one), content[one.start - request.start : one.stop - request.start])
        return content

    def read(self, shard: int, start: int, stop: int) -> memoryview:
        """Return the bytes of constant fields, or of a row of frames, that are held."""
        held, size = self._fetcher.held, stop - start
        if ByteRange(self, shard, start, stop) not in held:
            size = self.manifest.frame_bytes
        requests = {first: held[ByteRange(self, shard, first, first + size)] for first in range(start, stop, size)}
        if len(set(requests.values())) == 1:
            return requests[start].read(start, stop)
        return memoryview(b"".join(request.read(first, first + size) for first, request in requests.items()))

    def _blob(self, one: ByteRange) -> str:
        """Return the name in the cache: the content of the shard, and the place in it."""
        return f"{self.manifest.shards[one.shard].sha256}-{one.start}-{one.stop}"


class WholeShards(RemoteShards):
    """Whole shards through the cache on disk, for `shuffle: blocks`."""

    _cache: BlobCache

    def _whole(self, shard: int) -> ByteRange:
        return ByteRange(self, shard, 0, self.manifest.shards[shard].bytes)

    def needed(self, windows: WindowPlaces, constants: bool) -> set[ByteRange]:
        """Return the shards of the trajectories."""
        return {self._whole(self.manifest.trajectories[one].shard) for one in windows.trajectories}

    def requests(self, ranges: set[ByteRange]) -> list[Request]:
        """Return a request for each shard."""
        for one in self._fetcher.held:  # they are in use: the cache shall remove older shards to make room
            self._cache.touch(one.shards.manifest.shards[one.shard].sha256)
        return [Request([one], one.start, one.stop) for one in ranges]

    def load(self, request: Request) -> memoryview:
        """Fetch a shard into the cache if it is missing there. `read` maps it: a process can map few shards at once."""
        self._mapped(request.ranges[0].shard)
        return memoryview(b"")

    def read(self, shard: int, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of a shard that is held."""
        return self._mapped(shard)[start:stop]

    def _mapped(self, shard: int) -> memoryview:
        """Return the bytes of a shard. It is fetched again if it has left both the maps and the cache."""
        return self.maps.get(id(self), shard, lambda: self._map(shard))

    def _map(self, shard: int) -> mmap.mmap:
        record = self.manifest.shards[shard]

        def fill(path: Path) -> None:
            file = self.file(shard)
            self._fetcher.count(self.traffic, requests=1)
            file.fetch(path, record.bytes, lambda count: self._fetcher.count(self.traffic, fetched=count))

        descriptor = self._cache.fetch(record.sha256, record.bytes, fill, str(self.folder.file(record.name)))
        return map_and_close(descriptor, record.bytes)

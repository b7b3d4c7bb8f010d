"""What the two ways to read shards behind a URL have in common: threads, what was announced, the manifest, sizes.

The frames of windows as byte ranges of shards behind a URL: for `shuffle: global`, and for a few windows of many.

The frames of a draw are fetched ahead, neighbours in one request. Every frame is compared with the manifest's checksum
when it arrives, and again when it is read back from the cache on disk.

Whole shards behind a URL, for `shuffle: blocks`: through the cache on disk, then mapped as local ones are.

Shards behind a URL, read ahead of the schedule: the byte ranges of windows (ranges.py), or whole shards (blocks.py).

The loader announces the windows of the draws to come; threads fetch what they need while earlier batches are used.
Which windows come when is the schedule's business alone: how, and how fast, bytes arrive changes no batch.
"""

import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.files import UserError
from data_pipeline.remote import RemoteFile, RemoteFolder, Retries
from data_pipeline.shards.format import MANIFEST_NAME, Manifest
from data_pipeline.windows.cache import BlobCache
from data_pipeline.windows.reader import ByteSource, Traffic
from data_pipeline.workers import Threads

MANIFEST_LIMIT_BYTES = 64 * 2**20
THREADS = 8  # requests in flight, per process; of whole shards half as many


def load_manifest(file: RemoteFile) -> Manifest:
    """The manifest behind a URL. Raises UserError if there is none, or one that `Manifest.parse` refuses."""
    size = file.size()
    if size is None:
        content = file.read(MANIFEST_LIMIT_BYTES)
    elif size > MANIFEST_LIMIT_BYTES:
        raise UserError(f"{file}: expected a manifest of at most {MANIFEST_LIMIT_BYTES} bytes, the server has {size}")
    else:
        content = file.read_range(0, size)  # rather than `read`: a body that ends early is noticed
    return Manifest.parse(content, str(file))


class Fetcher:
    """The threads that fetch for some sources, and what was announced. It belongs to one process, with all that it
    holds: on the other side of a fork it starts empty."""

    num_threads = THREADS

    def __init__(self, cache: BlobCache | None) -> None:
        self.cache = cache
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self.lock = threading.Lock()
        self._threads: Threads | None = None
        self._announced: OrderedDict[object, Any] = OrderedDict()  # in the order of the schedule

    def own(self) -> None:
        """To be called before anything else: a fork's child has copies of locks that no thread of its will release."""
        if self._process != os.getpid():
            self._begin()

    def forget(self) -> None:
        """Drops what was announced: no one will ask for it."""
        self.own()
        with self.lock:
            while self._announced:
                self._drop(self._announced.popitem(last=False)[1])

    def count(self, traffic: Traffic, requests: int = 0, fetched: int = 0, used: int = 0) -> None:
        self.own()
        with self.lock:
            traffic.requests += requests
            traffic.bytes_used += used
            traffic.bytes_fetched += fetched

    def _submit(self, function: Callable[..., Any], *arguments: object) -> "Future[Any]":
        if self._threads is None:
            self._threads = Threads(self.num_threads)
        return self._threads.submit(function, *arguments)

    def _reach(self, key: object) -> Any:
        """What was announced under the key, None if nothing was. What came before it is dropped: its turn is over."""
        while key in self._announced:
            first, value = self._announced.popitem(last=False)
            if first == key:
                return value
            self._drop(value)
        return None

    def _drop(self, announced: Any) -> None:
        """What was announced is not needed any more."""


class RemoteShards(ByteSource):
    """What the two sources behind a URL have in common."""

    def __init__(self, folder: RemoteFolder, fetcher: Fetcher, draws_ahead: int) -> None:
        self.folder: RemoteFolder = folder
        self.manifest = load_manifest(folder.file(MANIFEST_NAME))
        self.traffic = Traffic()
        self.draws_ahead = draws_ahead
        self._fetcher = fetcher
        self._sizes_checked: set[int] = set()

    def forget(self) -> None:
        self._fetcher.forget()

    def _count_used(self, windows: int, length: int, constants: bool) -> None:
        stored = length * self.manifest.frame_bytes + constants * self.manifest.constants_bytes
        self._fetcher.count(self.traffic, used=windows * stored)

    def file(self, shard: int) -> RemoteFile:
        """A shard's file; UserError if it has not the size that the manifest states."""
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


GAP_BYTES = 256 * 1024  # two ranges closer than this are one request: less than what a round trip costs
REQUEST_BYTES = 16 * 2**20  # a request that grew to this takes no further range
HELD_BYTES = 256 * 2**20  # of announced draws, per process


class ByteRange(NamedTuple):
    """Bytes [start, stop) of a shard that have a checksum: a frame, or the constant fields of a trajectory."""

    shard: int
    start: int
    stop: int
    crc32: str


@dataclass(eq=False)
class Request:
    """Pieces of one shard that are fetched together; `users` counts the windows held or announced that need them."""

    source: "Ranges"
    pieces: list[ByteRange]
    start: int
    stop: int
    cached: bool = False
    users: int = 0
    content: "Future[memoryview]" = field(default_factory=Future)


def coalesce(source: "Ranges", pieces: Iterable[ByteRange]) -> list[Request]:
    """Few requests for many pieces: neighbours of one shard with at most GAP_BYTES between them go together."""
    requests: list[Request] = []
    for piece in sorted(pieces):
        last = requests[-1] if requests else None
        if (
            last is not None
            and last.pieces[0].shard == piece.shard
            and piece.start - last.stop <= GAP_BYTES
            and piece.stop - last.start <= REQUEST_BYTES
        ):
            last.pieces.append(piece)
            last.stop = max(last.stop, piece.stop)
        else:
            requests.append(Request(source, [piece], piece.start, piece.stop))
    return requests


class RangeFetcher(Fetcher):
    """Fetches ranges for several sources, within one bound on the bytes held."""

    def _begin(self) -> None:
        super()._begin()
        self._held: dict[tuple[Ranges, int, int, int], Request] = {}
        self._held_bytes = 0

    def announce(self, source: "Ranges", key: object, pieces: Sequence[ByteRange]) -> bool:
        self.own()
        with self.lock:
            if key in self._announced:
                return True
            size = sum(one.stop - one.start for one in pieces if (source, *one[:3]) not in self._held)
            if self._announced and self._held_bytes + size > HELD_BYTES:
                return False
            self._announced[key] = self._take(source, pieces)
        return True

    @contextmanager
    def hold(self, source: "Ranges", key: object, pieces: Sequence[ByteRange]) -> Iterator[None]:
        self.own()
        with self.lock:
            requests = self._reach(key)
            if requests is None:
                requests = self._take(source, pieces)
        try:
            for request in requests:
                request.content.result()
            yield
        finally:
            with self.lock:
                self._release(requests)

    def read(self, source: "Ranges", shard: int, start: int, stop: int) -> memoryview:
        """Bytes of one piece, or of a row of frames."""
        size, parts = source.manifest.frame_bytes, []
        if (source, shard, start, stop) in self._held:
            size = stop - start
        for first in range(start, stop, size):
            request = self._held[source, shard, first, first + size]
            parts.append((request, request.content.result()[first - request.start : first + size - request.start]))
        request = parts[0][0]
        if all(other is request for other, _ in parts):
            return request.content.result()[start - request.start : stop - request.start]
        return memoryview(b"".join(part for _, part in parts))

    def _take(self, source: "Ranges", pieces: Sequence[ByteRange]) -> list[Request]:
        """The request of each piece, one more user each; what is not held yet is submitted."""
        missing = [one for one in pieces if self._failed(self._held.get((source, *one[:3])))]
        there = [one for one in missing if self.cache is not None and self.cache.has(source.blob(one))]
        found = [Request(source, [one], one.start, one.stop, cached=True) for one in there]
        for request in found + coalesce(source, set(missing) - set(there)):
            for one in request.pieces:
                self._held[source, *one[:3]] = request
            self._held_bytes += request.stop - request.start
            request.content = self._submit(self._load, request)
        requests = [self._held[source, *one[:3]] for one in pieces]
        for request in requests:
            request.users += 1
        return requests

    @staticmethod
    def _failed(request: Request | None) -> bool:
        """Whether there is nothing to wait for: no request, or one that ended in an error."""
        return request is None or (request.content.done() and request.content.exception() is not None)

    def _drop(self, announced: Sequence[Request]) -> None:
        self._release(announced)

    def _release(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.users -= 1
            if request.users == 0:
                for one in request.pieces:
                    if self._held.get((request.source, *one[:3])) is request:
                        del self._held[request.source, *one[:3]]
                self._held_bytes -= request.stop - request.start
                request.content.cancel()

    def _load(self, request: Request) -> memoryview:
        """The bytes of a request, from the cache or the server; runs in a thread."""
        source, shard = request.source, request.pieces[0].shard
        if request.cached and self.cache is not None:
            (piece,) = request.pieces
            stored = self.cache.read(source.blob(piece), piece.stop - piece.start)
            if stored is not None and f"{zlib.crc32(stored):08x}" == piece.crc32:
                return memoryview(stored)
            self.cache.remove(source.blob(piece))  # torn or damaged: the server has it
        file = source.file(shard)
        content = memoryview(file.read_range(request.start, request.stop))
        self.count(source.traffic, requests=1, fetched=len(content))
        for piece in request.pieces:
            part = content[piece.start - request.start : piece.stop - request.start]
            if f"{zlib.crc32(part):08x}" != piece.crc32:
                raise UserError(
                    f"{file}: damaged: bytes {piece.start} to {piece.stop} have not the manifest's checksum; compare "
                    "the shard with the original (`data-pipeline verify` on that folder) and upload it again"
                )
            if self.cache is not None:
                self.cache.put(source.blob(piece), part)
        return content


class Ranges(RemoteShards):
    """Frames as byte ranges, for `shuffle: global`, and for whoever reads a few windows."""

    _fetcher: RangeFetcher

    def announce(self, trajectories: Sequence[int], firsts: Sequence[int], length: int) -> bool:
        key = (self, length, *trajectories, *firsts)
        return self._fetcher.announce(self, key, self._pieces(trajectories, firsts, length, constants=True))

    def hold(
        self, trajectories: Sequence[int], firsts: Sequence[int], length: int, constants: bool
    ) -> AbstractContextManager[None]:
        key = (self, length, *trajectories, *firsts) if constants else None
        self._count_used(len(trajectories), length, constants)
        return self._fetcher.hold(self, key, self._pieces(trajectories, firsts, length, constants))

    def read(self, shard: int, start: int, stop: int) -> memoryview:
        return self._fetcher.read(self, shard, start, stop)

    def blob(self, piece: ByteRange) -> str:
        """Name in the cache: content of the shard, and where in it."""
        return f"{self.manifest.shards[piece.shard].sha256}-{piece.start}-{piece.stop}"

    def _pieces(
        self, trajectories: Sequence[int], firsts: Sequence[int], length: int, constants: bool
    ) -> list[ByteRange]:
        manifest, pieces = self.manifest, set()
        size = manifest.frame_bytes
        for trajectory, first in zip(trajectories, firsts, strict=True):
            record = manifest.trajectories[trajectory]
            for frame in range(first, first + length):
                chunk, within = divmod(frame, manifest.frames_per_chunk)
                start = record.offsets[chunk] + within * size
                pieces.add(ByteRange(record.shard, start, start + size, record.crc32[8 * frame : 8 * frame + 8]))
            if constants and record.constants_offset is not None:
                start = record.constants_offset
                pieces.add(ByteRange(record.shard, start, start + manifest.constants_bytes, record.constants_crc32))
        return list(pieces)


class ShardFetcher(Fetcher):
    """Fetches whole shards into the cache and maps them, at most about `num_maps` at a time."""

    cache: BlobCache
    num_threads = THREADS // 2

    def __init__(self, cache: BlobCache, num_maps: int) -> None:
        self.num_maps = num_maps
        super().__init__(cache)

    def _begin(self) -> None:
        super()._begin()
        self._reading = threading.Lock()
        self.maps: OrderedDict[tuple[str, int], memoryview] = OrderedDict()  # (SHA-256, bytes); last used last
        self._coming: dict[tuple[str, int], Future[None]] = {}

    def announce(self, source: "WholeShards", key: object, shards: set[int]) -> bool:
        """Starts to fetch the shards, unless the cache has no room for all that was announced."""
        self.own()
        with self.lock:
            if key in self._announced:
                return True
            blobs = {source.blobs[shard] for shard in shards}
            wanted = blobs.union(*self._announced.values())
            if self._announced and sum(num_bytes for _, num_bytes in wanted) > self.cache.limit_bytes:
                return False
            self._announced[key] = blobs
            lacking = [one for one in shards if source.blobs[one] not in self.maps.keys() | self._coming.keys()]
            if lacking:
                self._touch_maps()
            for shard in lacking:
                self._coming[source.blobs[shard]] = self._submit(self._fetch, source, shard)
        return True

    @contextmanager
    def hold(self, source: "WholeShards", key: object, shards: set[int]) -> Iterator[None]:
        """Maps the shards. One thread at a time: the next might drop what this one reads."""
        self.own()
        with self._reading:
            with self.lock:
                self._reach(key)
            for shard in shards:
                self._map(source, shard)
            with self.lock:
                while len(self.maps) > max(self.num_maps, len(shards)):
                    self.maps.popitem(last=False)
            yield

    def forget(self) -> None:
        super().forget()
        with self.lock:
            self._coming = {blob: future for blob, future in self._coming.items() if not future.cancel()}

    def _map(self, source: "WholeShards", shard: int) -> None:
        blob = source.blobs[shard]
        with self.lock:
            if blob in self.maps:
                self.maps.move_to_end(blob)
                return
            coming = self._coming.pop(blob, None)
            if coming is None:
                self._touch_maps()
        if coming is not None:
            coming.result()
        descriptor = self._open(source, shard)
        try:
            content = mmap.mmap(descriptor, blob[1], access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        with self.lock:
            self.maps[blob] = memoryview(content)

    def _touch_maps(self) -> None:
        """What is mapped was used until now: something older makes room for what comes. Within the lock."""
        for name, _ in self.maps:
            self.cache.touch(name)

    def _fetch(self, source: "WholeShards", shard: int) -> None:
        os.close(self._open(source, shard))

    def _open(self, source: "WholeShards", shard: int) -> int:
        def fill(path: Path) -> None:
            file = source.file(shard)
            self.count(source.traffic, requests=1)
            file.fetch(path, num_bytes, lambda count: self.count(source.traffic, fetched=count))

        name, num_bytes = source.blobs[shard]
        origin = str(source.folder.file(source.manifest.shards[shard].name))
        return self.cache.fetch(name, num_bytes, fill, origin)


class WholeShards(RemoteShards):
    """Whole shards through the cache on disk, for `shuffle: blocks`."""

    _fetcher: ShardFetcher

    def __init__(self, folder: RemoteFolder, fetcher: ShardFetcher, draws_ahead: int) -> None:
        super().__init__(folder, fetcher, draws_ahead)
        self.blobs = [(shard.sha256, shard.bytes) for shard in self.manifest.shards]

    def announce(self, trajectories: Sequence[int], firsts: Sequence[int], length: int) -> bool:
        key = (self, length, *trajectories, *firsts)
        return self._fetcher.announce(self, key, self._shards(trajectories))

    def hold(
        self, trajectories: Sequence[int], firsts: Sequence[int], length: int, constants: bool
    ) -> AbstractContextManager[None]:
        self._count_used(len(trajectories), length, constants)
        return self._fetcher.hold(self, (self, length, *trajectories, *firsts), self._shards(trajectories))

    def read(self, shard: int, start: int, stop: int) -> memoryview:
        return self._fetcher.maps[self.blobs[shard]][start:stop]

    def _shards(self, trajectories: Sequence[int]) -> set[int]:
        return {self.manifest.trajectories[trajectory].shard for trajectory in trajectories}


@dataclass(frozen=True)
class StreamSettings:
    """How shards behind a URL are read."""

    shuffle: str = "global"  # the schedule's; global: ranges, blocks: whole shards
    shards_per_block: int = 4  # the schedule's, for blocks
    cache: Path | None = None  # folder; None: default_cache()
    cache_bytes: int = 40 * 10**9  # limit; 0: none, for global only
    draws_ahead: int = 64  # draws whose windows are fetched before they are asked for
    retries: Retries = field(default_factory=Retries)


def default_cache() -> Path:
    """$XDG_CACHE_HOME/wavelit, where the variable's default is ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wavelit"


def open_sources(
    root: RemoteFolder, datasets: Sequence[str], split: str, settings: StreamSettings
) -> Mapping[str, RemoteShards]:
    """The sources of some datasets under `root`, by name; they share threads, memory and the cache.

    Raises UserError if a manifest is missing or damaged, or if the cache cannot hold a block of shards of each dataset.
    """
    cache = BlobCache(settings.cache or default_cache(), settings.cache_bytes)
    folders = {name: root / name / split for name in datasets}
    if settings.shuffle == "global":
        ranges = RangeFetcher(cache if settings.cache_bytes else None)
        return {name: Ranges(folder, ranges, settings.draws_ahead) for name, folder in folders.items()}
    shards = ShardFetcher(cache, num_maps=2 * settings.shards_per_block * len(folders))
    sources = {name: WholeShards(folder, shards, settings.draws_ahead) for name, folder in folders.items()}
    _check_room(sources, cache, settings.shards_per_block)
    return sources


def _check_room(sources: Mapping[str, RemoteShards], cache: BlobCache, shards_per_block: int) -> None:
    """Raises UserError unless the cache can hold the largest block of each dataset at once."""
    needed = {}
    for name, source in sources.items():
        largest = sorted((shard.bytes for shard in source.manifest.shards), reverse=True)
        needed[name] = sum(largest[:shards_per_block])
    total = sum(needed.values())
    if total > cache.limit_bytes:
        each = ", ".join(f"{name} {num_bytes / 1e9:.3g}" for name, num_bytes in needed.items())
        raise UserError(
            f"{cache.folder}: the cache may hold {cache.limit_bytes / 1e9:.3g} GB, but one block of {shards_per_block} "
            f"shards of each dataset has {total / 1e9:.3g} GB ({each}): raise data.cache_gb (twice that has room for "
            "the next blocks), lower sampling.shards_per_block, or leave datasets out"
        )

"""The frames of windows as byte ranges of shards behind a URL: for `shuffle: global`, and for a few windows of many.

The frames of a draw are fetched ahead, neighbours in one request. Every frame is compared with the manifest's checksum
when it arrives, and again when it is read back from the cache on disk.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.windows.fetching import Fetcher, RemoteShards

GAP_BYTES = 256 * 1024  # two ranges closer than this are one request: less than what a round trip costs
REQUEST_BYTES = 16 * 2**20  # a request that grew to this takes no further range
HELD_BYTES = 256 * 2**20  # of announced draws, per process


class Piece(NamedTuple):
    """Bytes [start, stop) of a shard that have a checksum: a frame, or the constant fields of a trajectory."""

    shard: int
    start: int
    stop: int
    crc32: str


@dataclass(eq=False)
class Request:
    """Pieces of one shard that are fetched together; `users` counts the windows held or announced that need them."""

    source: "Ranges"
    pieces: list[Piece]
    start: int
    stop: int
    cached: bool = False
    users: int = 0
    content: "Future[memoryview]" = field(default_factory=Future)


def coalesce(source: "Ranges", pieces: Iterable[Piece]) -> list[Request]:
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

    def announce(self, source: "Ranges", key: object, pieces: Sequence[Piece]) -> bool:
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
    def hold(self, source: "Ranges", key: object, pieces: Sequence[Piece]) -> Iterator[None]:
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

    def _take(self, source: "Ranges", pieces: Sequence[Piece]) -> list[Request]:
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

    def blob(self, piece: Piece) -> str:
        """Name in the cache: content of the shard, and where in it."""
        return f"{self.manifest.shards[piece.shard].sha256}-{piece.start}-{piece.stop}"

    def _pieces(self, trajectories: Sequence[int], firsts: Sequence[int], length: int, constants: bool) -> list[Piece]:
        manifest, pieces = self.manifest, set()
        size = manifest.frame_bytes
        for trajectory, first in zip(trajectories, firsts, strict=True):
            record = manifest.trajectories[trajectory]
            for frame in range(first, first + length):
                chunk, within = divmod(frame, manifest.frames_per_chunk)
                start = record.offsets[chunk] + within * size
                pieces.add(Piece(record.shard, start, start + size, record.crc32[8 * frame : 8 * frame + 8]))
            if constants and record.constants_offset is not None:
                start = record.constants_offset
                pieces.add(Piece(record.shard, start, start + manifest.constants_bytes, record.constants_crc32))
        return list(pieces)

"""Whole shards behind a URL, for `shuffle: blocks`: through the cache on disk, then mapped as local ones are."""

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from data_pipeline.remote import RemoteFolder
from data_pipeline.windows.cache import BlobCache
from data_pipeline.windows.fetching import THREADS, Fetcher, RemoteShards


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

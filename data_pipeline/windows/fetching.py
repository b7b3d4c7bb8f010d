"""What the two ways to read shards behind a URL have in common: threads, what was announced, the manifest, sizes."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.remote import RemoteFile, RemoteFolder
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.threads import Threads
from data_pipeline.windows.cache import BlobCache
from data_pipeline.windows.reader import ByteSource, Traffic

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

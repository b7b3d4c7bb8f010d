"""Files and folders behind a URL (http, https, s3, gs, hf), with retries.

Nothing here looks at the content: the caller has to notice a page of HTML under the name of an HDF5 file. Local paths
never come here.
"""

import io
import os
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

from data_pipeline.errors import UserError
from data_pipeline.transport import Missing, RangeIgnored, Transient, Transport, redact, transport

PROTOCOLS = ("http", "https", "s3", "gs", "hf")

T = TypeVar("T")
Check = Callable[[bytes], str | None]  # returns what is wrong with a content that arrived, None if nothing is


class RangesUnsupported(UserError):
    """The server answers a request for a part of a file with the whole file."""


def is_url(location: str | Path) -> bool:
    """Return whether a location is not a plain local path: it has a scheme, or is a pipe or a chain of fsspec."""
    text = str(location)
    return re.match(r"[a-z][a-z0-9+.-]+:/|pipe:", text, re.IGNORECASE) is not None or "::" in text


def check_url(url: str) -> str:
    """Return the URL without trailing slashes. UserError unless it is a plain path under one of PROTOCOLS."""
    where = repr(redact(url)[:200])
    scheme, separator, rest = url.partition("://")
    if scheme not in PROTOCOLS or not separator or "::" in url:
        expected = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise UserError(f"{where}: expected a local path or a URL that starts with {expected}; nothing else is opened")
    host, *segments = rest.rstrip("/").split("/")
    if not host or " " in host or not url.isprintable() or any(character in url for character in "\\?#"):
        raise UserError(f"{where}: expected {scheme}://HOST/PATH without '?', '#' and backslashes")
    if any(unquote(segment) in ("", ".", "..") for segment in segments):
        raise UserError(f"{where}: expected a path without '..', '.' and empty parts; write it out")
    return url.rstrip("/")


def check_name(name: str, where: str) -> str:
    """Return the name. UserError unless it can only be a file or folder directly in the folder `where`."""
    odd = not name.isprintable() or any(character in name for character in "/\\?#%")
    if name in ("", ".", "..") or len(name) > 255 or odd or "::" in name:
        raise UserError(f"{where}: expected a plain file name, got {name[:80]!r}, which is not followed")
    return name


@dataclass(frozen=True)
class Retries:
    """How often and how patiently a failed request is repeated."""

    attempts: int = 6
    first_wait_seconds: float = 0.5  # doubles from attempt to attempt
    timeout_seconds: float = 60.0  # without a byte from the server

    def wait(self, failures: int) -> None:
        """Sleep after the n-th failure. The time is random, so requests that failed together do not repeat together."""
        jitter = random.SystemRandom().uniform(0.5, 1.5)  # the global generator belongs to the training
        time.sleep(self.first_wait_seconds * 2 ** (failures - 1) * jitter)


@dataclass(frozen=True, repr=False)
class _Location:
    """A checked URL. It can be pickled and used after a fork: connections are made when they are used."""

    url: str
    retries: Retries = Retries()

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", check_url(self.url))

    def __str__(self) -> str:
        return redact(self.url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({redact(self.url)!r})"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rsplit("/", 1)[1]

    @property
    def _transport(self) -> Transport:
        return transport(self.url.partition(":")[0], self.retries.timeout_seconds)

    def _retry(self, request: Callable[[], T], progress: Callable[[], object] = lambda: None) -> T:
        """Return the result of `request`, which is repeated after a Transient failure.

        Failures in a row count: a failure after which `progress()` has changed is the first again. The last one is
        raised as UserError.
        """
        failures, before = 0, progress()
        while True:
            try:
                return request()
            except Transient as error:
                now = progress()
                failures, before = (failures + 1 if now == before else 1), now
                if failures >= self.retries.attempts:
                    raise UserError(
                        f"{self}: failed {self.retries.attempts} times, the last time: {error}; "
                        "check the address and the server, then run the same command again"
                    ) from error
            self.retries.wait(failures)


class RemoteFolder(_Location):
    """A folder behind a URL."""

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{check_name(name, str(self))}", self.retries)

    def file(self, name: str) -> "RemoteFile":
        """Return a file of the folder. UserError if the name is not a plain one."""
        return RemoteFile(f"{self.url}/{check_name(name, str(self))}", self.retries)

    def names(self) -> list[str]:
        """Return the sorted names of the files and folders directly in it, unchecked: `file` and `/` check them.

        Raises UserError if the server cannot list the folder.
        """
        return sorted(self._retry(lambda: self._transport.names(self.url)))


class RemoteFile(_Location):
    """A file behind a URL; all methods may be called from many threads at once."""

    def size(self) -> int | None:
        """Return the size in bytes; None if the server does not give it. UserError if there is no such file."""
        return self._retry(lambda: self._transport.size(self.url))

    def known_size(self) -> int:
        """Return the size in bytes. UserError if the server does not give it."""
        size = self.size()
        if size is None:
            raise UserError(f"{self}: the server does not tell the file's size; download the file first")
        return size

    def exists(self) -> bool:
        """Return whether the server has the file. UserError if the server does not answer."""
        try:
            self.size()
        except Missing:
            return False
        return True

    def read(self, limit: int, check: Check = lambda content: None) -> bytes:
        """Return the whole file, fetched again if `check` refuses it. UserError if it has more than `limit` bytes."""
        total, content = self.size(), bytearray()
        too_long = UserError(f"{self}: expected at most {limit} bytes, got more; is this the right file?")
        if total is not None and total > limit:
            raise too_long

        def request() -> None:
            content.clear()
            for chunk in self._transport.chunks(self.url, 0, total):
                content.extend(chunk)
                if len(content) > limit:
                    raise too_long
            if (wrong := check(bytes(content))) is not None:
                raise Transient(wrong)

        self._retry(request)
        return bytes(content)

    def read_range(self, start: int, stop: int, check: Check = lambda content: None) -> bytes:
        """Return exactly the bytes [start, stop), fetched again if `check` refuses them.

        Raises RangesUnsupported if the server sends the whole file instead, which is not read; UserError if the file
        ends before `stop` or the server does not answer.
        """
        assert 0 <= start <= stop, (start, stop)
        if start == stop:
            return b""
        ignored = 0

        def request() -> bytes:
            nonlocal ignored
            try:
                content = self._transport.read_range(self.url, start, stop)
            except RangeIgnored as error:  # some content networks do so once, while they fill their cache
                ignored += 1
                if ignored < min(2, self.retries.attempts):
                    raise
                raise RangesUnsupported(
                    f"{self}: the server sends the whole file where a part was asked for (no HTTP range support). "
                    "For shards set `sampling.shuffle: blocks`, which fetches them whole; download HDF5 files "
                    "first; or use another server"
                ) from error
            if (wrong := check(content)) is not None:
                raise Transient(wrong)
            return content

        return self._retry(request)

    def fetch(self, path: Path, num_bytes: int | None, on_bytes: Callable[[int], object]) -> None:
        """Write the whole file to `path`, continuing after the bytes that `path` already holds.

        `num_bytes` is the size that the file must have. None: the server's size; if the server gives none, the size is
        not checked and nothing is continued. `on_bytes` gets the counts of bytes that arrive. Only failures in a row
        count, so a large file arrives from a server that drops it now and then. Raises UserError if the server does
        not answer, if the size is wrong, or if `path` holds more; `path` keeps what has arrived.
        """
        total = self.size() if num_bytes is None else num_bytes
        with path.open("ab") as file:

            def append() -> None:
                held = file.truncate(0) if total is None else file.tell()
                if total is not None and held > total:  # the size may be a page of HTML's: keep what has arrived
                    raise UserError(
                        f"{self}: the server says {total} bytes, but {path} holds {held} already; if the file on the "
                        "server has changed, remove that one; then run the same command again"
                    )
                for chunk in self._transport.chunks(self.url, held, total):
                    file.write(chunk)
                    file.flush()  # what has arrived survives a kill
                    on_bytes(len(chunk))

            self._retry(append, progress=lambda: total is not None and file.tell())

    def open(self) -> BinaryIO:
        """Return a seekable file for h5py that keeps the blocks read last. UserError if the server gives no size."""
        return cast(BinaryIO, _RangeFile(self, self.known_size()))


class _RangeFile(io.RawIOBase):
    """A file read by ranges; at most NUM_BLOCKS blocks of BLOCK_BYTES are kept.

    Unlike with fsspec's BlockCache, one request brings all blocks of a read, and a large read leaves the blocks alone.
    """

    BLOCK_BYTES = 2**20
    NUM_BLOCKS = 32

    def __init__(self, file: RemoteFile, size: int) -> None:
        self.name = str(file)
        self._file, self._size, self._position = file, size, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start = min(self._position, self._size)
        stop = min(start + len(view), self._size)
        view[: stop - start] = self._read(start, stop)
        self._position = stop
        return stop - start

    def _read(self, start: int, stop: int) -> bytes:
        if stop - start >= self.BLOCK_BYTES * self.NUM_BLOCKS // 4:  # a large read would push everything else out
            return self._file.read_range(start, stop)
        blocks = range(start // self.BLOCK_BYTES, -(-stop // self.BLOCK_BYTES))
        missing = [block for block in blocks if block not in self._blocks]
        if missing:  # one request, from the first to the last block that is not there
            offset = missing[0] * self.BLOCK_BYTES
            content = self._file.read_range(offset, min((missing[-1] + 1) * self.BLOCK_BYTES, self._size))
            for block in range(missing[0], missing[-1] + 1):
                begin = block * self.BLOCK_BYTES - offset
                self._blocks[block] = content[begin : begin + self.BLOCK_BYTES]
        for block in blocks:
            self._blocks.move_to_end(block)
        joined = b"".join(self._blocks[block] for block in blocks)
        while len(self._blocks) > self.NUM_BLOCKS:
            self._blocks.popitem(last=False)
        return joined[start - blocks.start * self.BLOCK_BYTES : stop - blocks.start * self.BLOCK_BYTES]

"""Files and folders behind a URL (http, https, s3, gs, hf), with retries.

Nothing here looks at what a file holds: a page of HTML under the name of an HDF5 file is the caller's to notice. What
is noticed is a length that is not the one asked for. Local paths never come here.
"""

import io
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.hashing import stream_key, uniform
from data_pipeline.transport import Http, Missing, RangeIgnored, Store, Transient, shown, transport

PROTOCOLS = ("http", "https", "s3", "gs", "hf")
_LOOKS_LIKE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|pipe:", re.IGNORECASE)

T = TypeVar("T")


class RangesUnsupported(UserError):
    """The server answers a request for a part of a file with the whole file."""


def is_url(location: str | Path) -> bool:
    """Whether a location is anything but a plain local path: it has a scheme, or is a pipe or a chain of fsspec."""
    text = str(location)
    return _LOOKS_LIKE_URL.match(text) is not None or "::" in text


def check_url(url: str) -> str:
    """The URL without trailing slashes; UserError unless it is a plain folder or file under one of PROTOCOLS."""
    where = repr(shown(url)[:200])
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
    """The name, if it can only be that of a file or folder directly in the folder `where`; else UserError."""
    odd = not name.isprintable() or any(character in name for character in "/\\?#%")
    if name in ("", ".", "..") or len(name) > 255 or odd or "::" in name:
        raise UserError(f"{where}: expected a plain file name, got {name[:80]!r}, which is not followed")
    return name


@dataclass(frozen=True)
class Retries:
    """How often and how patiently a request is repeated before its failure is the user's matter."""

    attempts: int = 6
    first_wait_seconds: float = 0.5  # doubles from attempt to attempt
    timeout_seconds: float = 60.0  # without a byte from the server

    def wait(self, failures: int, url: str) -> None:
        """Sleeps after the n-th failure; processes and files that failed together do not come back together."""
        jitter = float(uniform(stream_key(url, os.getpid()), np.array([failures], np.uint64))[0])
        time.sleep(self.first_wait_seconds * 2 ** (failures - 1) * (0.5 + jitter))


@dataclass(frozen=True, repr=False)
class _Location:
    """A checked URL. Picklable, and good on both sides of a fork: connections are made when and where they are used."""

    url: str
    retries: Retries = Retries()

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", check_url(self.url))

    def __str__(self) -> str:
        return shown(self.url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.url)!r})"

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def _backend(self) -> "Http | Store":
        return transport(self.url.partition(":")[0], self.retries.timeout_seconds)

    def _persist(self, action: Callable[[], T]) -> T:
        """The action's result, repeated while it fails in a way that may pass."""
        for failures in range(1, self.retries.attempts + 1):
            try:
                return action()
            except Transient as error:
                if failures == self.retries.attempts:
                    raise self._given_up(error) from error
            self.retries.wait(failures, self.url)
        raise AssertionError("no attempt was made")

    def _given_up(self, error: Exception) -> UserError:
        return UserError(
            f"{self}: failed {self.retries.attempts} times, the last time: {error}; "
            "check the address and the server, then run the same command again"
        )


class RemoteFolder(_Location):
    """A folder behind a URL."""

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{check_name(name, str(self))}", self.retries)

    def file(self, name: str) -> "RemoteFile":
        return RemoteFile(f"{self.url}/{check_name(name, str(self))}", self.retries)

    def names(self) -> list[str]:
        """Names of the files and folders directly in it, sorted, as the server gives them: `file` and `/` check them.

        Raises UserError if the server cannot list the folder.
        """
        return sorted(self._persist(lambda: self._backend.names(self.url)))


class RemoteFile(_Location):
    """A file behind a URL; all methods may be called from many threads at once."""

    def size(self) -> int | None:
        """Size in bytes; None when the server does not tell. Raises UserError if there is no such file."""
        return self._persist(lambda: self._backend.size(self.url))

    def exists(self) -> bool:
        """Whether the server has the file; UserError when it cannot be asked."""
        try:
            self.size()
        except Missing:
            return False
        return True

    def read(self, limit: int) -> bytes:
        """The whole file; UserError when it is longer than `limit` bytes."""
        content = self._persist(lambda: self._backend.beginning(self.url, limit + 1))
        if len(content) > limit:
            raise UserError(f"{self}: expected at most {limit} bytes, got more; this is not the file it should be")
        return content

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), exactly.

        Raises RangesUnsupported when the server sends the whole file instead, which is not read; UserError when the
        file ends before `stop` or the server stays away.
        """
        assert 0 <= start <= stop, (start, stop)
        if start == stop:
            return b""
        ignored = 0

        def attempt() -> bytes:
            nonlocal ignored
            try:
                return self._backend.range(self.url, start, stop)
            except RangeIgnored as error:  # some content networks do so once, while they fill their cache
                ignored += 1
                if ignored < min(2, self.retries.attempts):
                    raise
                raise RangesUnsupported(
                    f"{self}: the server sends the whole file where a part was asked for (no HTTP range support). "
                    "For shards set `sampling.shuffle: blocks`, which fetches them whole; download HDF5 files "
                    "first; or use another server"
                ) from error

        return self._persist(attempt)

    def fetch(self, path: Path, num_bytes: int | None, on_bytes: Callable[[int], object]) -> None:
        """The whole file into `path`, going on from what `path` already holds of it.

        num_bytes: the size it must come out with; None: the server's size, or no check if it tells none (then nothing
        is resumed). on_bytes gets the counts of bytes that arrive. Failures in a row count, not failures in all: a
        server that drops a large file now and then is worn down. Raises UserError when it stays away, when the file
        comes out short or long, or when `path` holds more than that; `path` keeps what has come.
        """
        total = self.size() if num_bytes is None else num_bytes
        failures = 0
        with path.open("ab") as file:
            held = file.tell()
            while True:
                if total is None:
                    held = file.truncate(0)
                elif held > total:  # a page of HTML may have told the size: that costs nobody what has come
                    raise UserError(
                        f"{self}: the server says {total} bytes, but {path} holds {held} already; if the file on the "
                        "server has changed, remove that one; then run the same command again"
                    )
                before = held
                try:
                    for piece in self._backend.pieces(self.url, held, total):
                        file.write(piece)
                        file.flush()  # what has come survives a kill
                        held += len(piece)
                        on_bytes(len(piece))
                    return
                except Transient as error:
                    failures = 1 if held > before and total is not None else failures + 1
                    if failures >= self.retries.attempts:
                        raise self._given_up(error) from error
                self.retries.wait(failures, self.url)

    def open(self) -> BinaryIO:
        """A seekable file for h5py that keeps the blocks read last; UserError when the server tells no size."""
        size = self.size()
        if size is None:
            raise UserError(f"{self}: the server does not tell the file's size; download the file first")
        return cast(BinaryIO, _RangeFile(self, size))


class _RangeFile(io.RawIOBase):
    """A file read by ranges; at most NUM_BLOCKS blocks of BLOCK_BYTES are kept."""

    BLOCK_BYTES = 2**20
    NUM_BLOCKS = 32

    def __init__(self, file: RemoteFile, size: int) -> None:
        self.name = str(file)
        self._file, self._size, self._position = file, size, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

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
        first, last = start // self.BLOCK_BYTES, -(-stop // self.BLOCK_BYTES)
        missing = [block for block in range(first, last) if block not in self._blocks]
        if missing:  # one request, from the first to the last block that is not there
            offset = missing[0] * self.BLOCK_BYTES
            content = self._file.read_range(offset, min((missing[-1] + 1) * self.BLOCK_BYTES, self._size))
            for block in range(missing[0], missing[-1] + 1):
                begin = block * self.BLOCK_BYTES - offset
                self._blocks[block] = content[begin : begin + self.BLOCK_BYTES]
        for block in range(first, last):
            self._blocks.move_to_end(block)
        joined = b"".join(self._blocks[block] for block in range(first, last))
        while len(self._blocks) > self.NUM_BLOCKS:
            self._blocks.popitem(last=False)
        return joined[start - first * self.BLOCK_BYTES : stop - first * self.BLOCK_BYTES]

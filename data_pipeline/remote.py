"""Requests for files over HTTP and to object stores, on fsspec, each tried once; remote.py repeats those that fail.

HTTP goes through fsspec's session, but the requests are written out: fsspec's own reads take a whole file into memory
when a server ignores the range, and take any body for the range asked for.

Files and folders behind a URL (http, https, s3, gs, hf), with retries.

Nothing here looks at what a file holds: a page of HTML under the name of an HDF5 file is the caller's to notice. What
is noticed is a length that is not the one asked for. Local paths never come here.
"""

import io
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp
import fsspec
import numpy as np
from fsspec.asyn import iothread, reset_lock, sync

from data_pipeline.files import UserError
from data_pipeline.hashing import stream_key, uniform

EXTRAS = {"s3": "s3", "gs": "gcs"}  # scheme -> our extra that installs its package; the others need none
_PIECE_BYTES = 256 * 1024  # written at a time, at most
_STORE_PIECE_BYTES = 8 * 2**20  # a request to an object store is a range of this size
_AS_IT_IS = {"Accept-Encoding": "identity"}  # a compressed body has another length than the file
_PAGE_BYTES = 16 * 2**20  # of the listing of a folder


class Missing(UserError):
    """The server says that there is no such file."""


class Transient(Exception):
    """A failure that another attempt may not meet: a drop, a timeout, a 5xx, a body of the wrong length."""


class RangeIgnored(Transient):
    """The whole file came where a part was asked for."""


def shown(url: str) -> str:
    """The URL for messages, without the password or token that may stand before the host."""
    return re.sub(r"//[^/]*@", "//***@", url, count=1)


_locks: dict[int, threading.Lock] = {}  # by process: a fork's child has copies of locks that no one will release


def transport(scheme: str, timeout_seconds: float) -> "Http | Store":
    """The connections of this process. A fork's parent keeps its own: its sockets and its loop are not the child's."""
    process = os.getpid()
    with _locks.setdefault(process, threading.Lock()):  # or threads that come first together make one each
        return _transport(scheme, timeout_seconds, process)


@cache  # a handful: schemes x timeouts x the processes of a line of forks
def _transport(scheme: str, timeout_seconds: float, process: int) -> "Http | Store":
    if iothread[0] is not None and not iothread[0].is_alive():  # we are a fork: fsspec's thread stayed with the parent
        reset_lock()
    return Http(timeout_seconds) if scheme in ("http", "https") else Store(scheme)


class Http:
    """Requests over HTTP, each tried once."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
        # trust_env: proxies, as curl takes them.
        client = {"timeout": timeout, "trust_env": True, "auto_decompress": False, "headers": _AS_IT_IS}
        self._fs = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=client)

    def size(self, url: str) -> int | None:
        try:
            with self._request("HEAD", url) as response:
                if response.content_length is not None:
                    return response.content_length
        except _HeadRefused:
            pass
        with self._request("GET", url, (0, 1)) as response:
            return response.content_length if response.status == 200 else _range_of(response)[1]

    def beginning(self, url: str, limit: int) -> bytes:
        with self._request("GET", url) as response:
            return self._read(response, limit)

    def range(self, url: str, start: int, stop: int) -> bytes:
        num_bytes = stop - start
        with self._request("GET", url, (start, stop)) as response:
            whole = response.status == 200 and start == 0 and response.content_length == num_bytes
            if response.status != 206 and not whole:
                self._refuse_whole(response, start, stop)
            if response.status == 206:
                first, total = _range_of(response)
                if total is not None and total < stop:
                    raise _too_short(url, start, stop, total)
                if first is not None and first != start:
                    raise Transient(f"bytes from {first} on came where those from {start} on were asked for")
            content = self._read(response, num_bytes + 1)
        if len(content) != num_bytes:
            raise Transient(f"{len(content)} bytes came where {num_bytes} were asked for")
        return content

    def pieces(self, url: str, start: int, total: int | None) -> Generator[bytes]:
        """The file from `start` on. A server that ignores the range sends what is here already once more."""
        if start == total:
            return
        with self._request("GET", url, (start, total) if start and total else None) as response:
            announced = response.content_length
            skip = 0
            if response.status == 206:
                first, announced = _range_of(response)
                if first != start:
                    raise Transient(f"bytes from {first} on came where those from {start} on were asked for")
            else:
                skip = start
            if None not in (total, announced) and announced != total:
                raise Transient(f"the server announces {announced} bytes where {total} are expected")
            position = start - skip
            # What a read returns is safe; what aiohttp holds when the connection drops is lost, so little is asked for.
            while piece := self._sync(url, response.content.read, _PIECE_BYTES):
                position += len(piece)
                if total is not None and position > total:
                    raise Transient(f"more than the {total} bytes announced came")
                if position > start:
                    yield piece[max(0, len(piece) - (position - start)) :]
        if total is not None and position != total:
            raise Transient(f"the body ended at byte {position} of {total}")

    def names(self, url: str) -> set[str]:
        with self._request("GET", url + "/") as response:
            if response.content_type != "text/html":
                raise UserError(
                    f"{shown(url)}: expected a page that lists the folder, got {response.content_type}; this server "
                    "does not list folders"
                )
            page = self._read(response, _PAGE_BYTES)
        return _children(page.decode("utf-8", "replace"), url + "/")

    @contextmanager
    def _request(
        self, method: str, url: str, span: tuple[int, int | None] | None = None
    ) -> Iterator[aiohttp.ClientResponse]:
        """A response with status 200 or 206; leaving the block drops what was not read of it."""
        headers = {} if span is None else {"Range": f"bytes={span[0]}-{'' if span[1] is None else span[1] - 1}"}
        response = self._sync(url, self._send, method, url, headers)
        try:
            _check_status(response, method, url, span)
            yield response
        finally:
            self._fs.loop.call_soon_threadsafe(response.close)

    async def _send(self, method: str, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        session = await self._fs.set_session()
        return await session.request(method, self._fs.encode_url(url), headers=headers, allow_redirects=True)

    def _read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """Up to `limit` bytes; fewer only at the end."""
        return self._sync(str(response.url), _read_up_to, response.content, limit)

    def _refuse_whole(self, response: aiohttp.ClientResponse, start: int, stop: int) -> None:
        came = f"status {response.status}, {response.content_type}, {response.content_length} bytes"
        if response.content_type == "text/html":
            raise Transient(f"a page of HTML came instead of bytes {start} to {stop} ({came})")
        raise RangeIgnored(f"the whole file came instead of bytes {start} to {stop} ({came})")

    def _sync(self, url: str, operation: Callable[..., Any], *arguments: object) -> Any:
        """Runs a coroutine on fsspec's loop; the failures of the network become ours."""
        try:
            return sync(self._fs.loop, operation, *arguments)
        except (ValueError, aiohttp.ClientSSLError) as error:  # a port that is no number, a bad certificate
            reason = str(error).replace(url, shown(url))
            raise UserError(f"{shown(url)}: cannot be opened: {type(error).__name__}: {reason}") from None
        except TimeoutError as error:
            raise Transient(f"no answer within {self._timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Transient(f"{type(error).__name__}: {error}".replace(url, shown(url))) from error


class _HeadRefused(Transient):
    """The server knows no HEAD requests."""


async def _read_up_to(content: aiohttp.StreamReader, limit: int) -> bytes:
    pieces, held = [], 0
    while held < limit and (piece := await content.read(limit - held)):
        pieces.append(piece)
        held += len(piece)
    return b"".join(pieces)


def _check_status(response: aiohttp.ClientResponse, method: str, url: str, span: tuple[int, int | None] | None) -> None:
    status, answer = response.status, f"the server answers {response.status} {response.reason or ''}".rstrip()
    if status == 200 or (status == 206 and span is not None):
        return
    if status in (404, 410):
        raise Missing(f"{shown(url)}: no such file on the server ({answer}); check the address")
    if status == 416 and span is not None:
        raise _too_short(url, span[0], span[1], _range_of(response)[1])
    if status in (405, 501) and method == "HEAD":
        raise _HeadRefused(answer)
    if status in (408, 425, 429) or status >= 500:
        raise Transient(answer)
    raise UserError(f"{shown(url)}: {answer}; check the address and whether the file is open to you")


def _range_of(response: aiohttp.ClientResponse) -> tuple[int | None, int | None]:
    """First byte and total size as Content-Range tells them; None for what it does not."""
    match = re.fullmatch(
        r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)", response.headers.get("Content-Range", "")
    )
    first, total = match.groups() if match else (None, None)
    return None if first is None else int(first), None if total is None else int(total)


def _too_short(url: str, start: int, stop: int | None, total: int | None) -> UserError:
    size = "fewer" if total is None else str(total)
    wanted = f"from {start} on" if stop is None else f"{start} to {stop}"
    return UserError(
        f"{shown(url)}: expected bytes {wanted}, but the file on the server holds {size}; it is another file or was "
        "not uploaded whole"
    )


def _children(page: str, folder: str) -> set[str]:
    """Names that the links of a page give for what lies directly in `folder`."""
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value for key, value in attrs if tag == "a" and key == "href" and value)

    Links().feed(page)
    base = urlsplit(folder)
    names = set()
    for link in links:
        try:
            parts = urlsplit(urljoin(folder, link))
        except ValueError:  # a host with a stray bracket
            continue
        inside = parts.hostname == base.hostname and unquote(parts.path).startswith(unquote(base.path))
        name = parts.path[len(base.path) :].rstrip("/") if inside else ""
        if name and "/" not in name:
            names.add(unquote(name))
    return names


class Store:
    """An object store through its fsspec package, each request tried once."""

    def __init__(self, scheme: str) -> None:
        try:
            self._fs = fsspec.filesystem(scheme, skip_instance_cache=True)
        except ImportError as error:
            wanted = f"'wavelit-fm[{EXTRAS[scheme]}]'" if scheme in EXTRAS else "huggingface_hub"
            raise UserError(f"{scheme}://: a package is missing ({error}); run: pip install {wanted}") from error

    def size(self, url: str) -> int | None:
        with _store_errors(url):
            size = self._fs.info(url)["size"]
        return None if size is None else int(size)

    def beginning(self, url: str, limit: int) -> bytes:
        size = self.size(url)
        return self._cat(url, 0, limit) if size is None else self.range(url, 0, min(limit, size))

    def range(self, url: str, start: int, stop: int) -> bytes:
        content = self._cat(url, start, stop)
        if len(content) != stop - start:
            size = self.size(url)
            if size is not None and size < stop:
                raise _too_short(url, start, stop, size)
            raise Transient(f"{len(content)} bytes came where {stop - start} were asked for")
        return content

    def pieces(self, url: str, start: int, total: int | None) -> Generator[bytes]:
        if total is None:
            raise UserError(f"{shown(url)}: the store does not tell the file's size")
        for first in range(start, total, _STORE_PIECE_BYTES):
            yield self.range(url, first, min(first + _STORE_PIECE_BYTES, total))

    def names(self, url: str) -> set[str]:
        with _store_errors(url):
            paths = self._fs.ls(url, detail=False)
        return {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}

    def _cat(self, url: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        with _store_errors(url):
            return bytes(self._fs.cat_file(url, start=start, end=stop))


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Sorts what s3fs, gcsfs and huggingface_hub raise; each has its own types, above those of its own client."""
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(f"{shown(url)}: no such file in the store ({error}); check the address") from error
    except (PermissionError, NotImplementedError, ValueError) as error:
        raise UserError(f"{shown(url)}: {type(error).__name__}: {error}; check the address and your access") from error
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | EOFError):
            raise  # a bug, ours or the package's
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{shown(url)}: status {status}: {error}; check your access") from error
        raise Transient(f"{type(error).__name__}: {error}") from error


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

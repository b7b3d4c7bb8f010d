"""Files and folders behind a URL (http, https, s3, gs, hf), with retries.

Requests go through fsspec. Those over HTTP use its session but are written out here: fsspec's own reads take a whole
file into memory when a server ignores the range, and take any body for the range that was requested.

Nothing here looks at the content: the caller has to notice a page of HTML under the name of an HDF5 file. What is
noticed is a body of the wrong length. Local paths never come here.
"""

import io
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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

PROTOCOLS = ("http", "https", "s3", "gs", "hf")
EXTRAS = {"s3": "s3", "gs": "gcs"}  # scheme -> our extra that installs its package; the others need none
_CHUNK_BYTES = 256 * 1024  # written at a time, at most
_STORE_CHUNK_BYTES = 8 * 2**20  # a request to an object store is a range of this size
_PAGE_BYTES = 16 * 2**20  # of the listing of a folder

T = TypeVar("T")
Span = tuple[int, int | None]  # first byte and end of a range


class Missing(UserError):
    """The server has no such file."""


class RangesUnsupported(UserError):
    """The server answers a request for a part of a file with the whole file."""


class Transient(Exception):
    """A failure that another attempt may not meet: a drop, a timeout, a 5xx, a body of the wrong length."""


class RangeIgnored(Transient):
    """The whole file came where a part was requested."""


class _HeadRefused(Transient):
    """The server accepts no HEAD requests."""


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


def redact(url: str) -> str:
    """Return the URL for messages, without the password or token that may stand before the host."""
    return re.sub(r"//[^/]*@", "//***@", url, count=1)


@dataclass(frozen=True)
class Retries:
    """How often and how patiently a failed request is repeated."""

    attempts: int = 6
    first_wait_seconds: float = 0.5  # doubles from attempt to attempt
    timeout_seconds: float = 60.0  # without a byte from the server

    def wait(self, failures: int, url: str) -> None:
        """Sleep after the n-th failure; processes and files that failed together do not come back together."""
        jitter = float(uniform(stream_key(url, os.getpid()), np.array([failures], np.uint64))[0])
        time.sleep(self.first_wait_seconds * 2 ** (failures - 1) * (0.5 + jitter))


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
    def _transport(self) -> "_Http | _Store":
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
            self.retries.wait(failures, self.url)


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

    def exists(self) -> bool:
        """Return whether the server has the file. UserError if the server does not answer."""
        try:
            self.size()
        except Missing:
            return False
        return True

    def read(self, limit: int) -> bytes:
        """Return the whole file. UserError if it is longer than `limit` bytes."""

        def request() -> bytes:
            content = bytearray()
            for chunk in self._transport.chunks(self.url, 0, None):
                content += chunk
                if len(content) > limit:
                    raise UserError(
                        f"{self}: expected at most {limit} bytes, got more; this is not the file it should be"
                    )
            return bytes(content)

        return self._retry(request)

    def read_range(self, start: int, stop: int) -> bytes:
        """Return exactly the bytes [start, stop).

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
                return self._transport.read_range(self.url, start, stop)
            except RangeIgnored as error:  # some content networks do so once, while they fill their cache
                ignored += 1
                if ignored < min(2, self.retries.attempts):
                    raise
                raise RangesUnsupported(
                    f"{self}: the server sends the whole file where a part was asked for (no HTTP range support). "
                    "For shards set `sampling.shuffle: blocks`, which fetches them whole; download HDF5 files "
                    "first; or use another server"
                ) from error

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
        size = self.size()
        if size is None:
            raise UserError(f"{self}: the server does not tell the file's size; download the file first")
        return cast(BinaryIO, _RangeFile(self, size))


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


_locks: dict[int, threading.Lock] = {}  # by process: a forked child's copy of a held lock would never be released
_open: "dict[tuple[int, str, float], _Http | _Store]" = {}


def transport(scheme: str, timeout_seconds: float) -> "_Http | _Store":
    """Return the connections of this process. A forked child makes its own: sockets and loop are its parent's."""
    process = os.getpid()
    with _locks.setdefault(process, threading.Lock()):
        key = (process, "http" if scheme == "https" else scheme, timeout_seconds)
        if key not in _open:
            if iothread[0] is not None and not iothread[0].is_alive():  # in a fork: fsspec's thread is the parent's
                reset_lock()
            _open[key] = _Http(timeout_seconds) if key[1] == "http" else _Store(scheme)
        return _open[key]


class _Http:
    """Requests over HTTP, each tried once; fsspec's event loop runs them in a thread of its own."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
        # No compression: the body would have another length than the file. trust_env: proxies, as curl takes them.
        uncompressed = {"auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}
        client = {"timeout": timeout, "trust_env": True, **uncompressed}
        self._fs = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=client)

    def size(self, url: str) -> int | None:
        with suppress(_HeadRefused), self._request("HEAD", url) as response:
            if response.content_length is not None:
                return response.content_length
        with self._request("GET", url, (0, 1)) as response:
            return response.content_length if response.status == 200 else _content_range(response)[1]

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        with self._request("GET", url, (start, stop)) as response:
            if response.status == 206:
                first, total = _content_range(response)
                if total is not None and total < stop:
                    raise _too_short(url, (start, stop), total)
                if first not in (None, start):
                    raise Transient(f"bytes from {first} on came where those from {start} on were asked for")
            elif start > 0 or response.content_length != stop - start:  # the whole file, which is not read
                kind = response.content_type
                came = f"(status {response.status}, {kind}, {response.content_length} bytes)"
                if kind == "text/html":
                    raise Transient(f"a page of HTML came instead of bytes {start} to {stop} {came}")
                raise RangeIgnored(f"the whole file came instead of bytes {start} to {stop} {came}")
            content = self._read(response, stop - start + 1)
        if len(content) != stop - start:
            raise Transient(f"{len(content)} bytes came where {stop - start} were asked for")
        return content

    def chunks(self, url: str, start: int, total: int | None) -> Generator[bytes]:
        """Yield the file from `start` on. The beginning is skipped if the server ignores the range and sends it."""
        if start == total:
            return
        with self._request("GET", url, (start, total) if start and total else None) as response:
            position, announced = 0, response.content_length
            if response.status == 206:
                first, announced = _content_range(response)
                if first != start:
                    raise Transient(f"bytes from {first} on came where those from {start} on were asked for")
                position = start
            if None not in (total, announced) and announced != total:
                raise Transient(f"the server announces {announced} bytes where {total} are expected")
            # When the connection drops, bytes that aiohttp holds are lost, so each read is small.
            while chunk := sync(self._fs.loop, response.content.read, _CHUNK_BYTES):
                position += len(chunk)
                if total is not None and position > total:
                    raise Transient(f"more than the {total} bytes announced came")
                if position > start:
                    yield chunk[max(0, len(chunk) - (position - start)) :]
        if total is not None and position != total:
            raise Transient(f"the body ended at byte {position} of {total}")

    def names(self, url: str) -> set[str]:
        with self._request("GET", url + "/") as response:
            if response.content_type != "text/html":
                raise UserError(
                    f"{redact(url)}: expected a page that lists the folder, got {response.content_type}; this server "
                    "does not list folders"
                )
            page = self._read(response, _PAGE_BYTES)
        return _children(page.decode("utf-8", "replace"), url + "/")

    @contextmanager
    def _request(self, method: str, url: str, span: Span | None = None) -> Iterator[aiohttp.ClientResponse]:
        """Yield a response with status 200 or 206. Failures of the network within the block become Transient.

        What was not read of the response at the end of the block is dropped.
        """
        headers = {} if span is None else {"Range": f"bytes={span[0]}-{'' if span[1] is None else span[1] - 1}"}

        async def send() -> aiohttp.ClientResponse:
            session = await self._fs.set_session()
            return await session.request(method, self._fs.encode_url(url), headers=headers, allow_redirects=True)

        response = None
        try:
            response = sync(self._fs.loop, send)
            _check_status(response, method, url, span)
            yield response
        except (ValueError, aiohttp.ClientSSLError) as error:  # a port that is no number, a bad certificate
            reason = str(error).replace(url, redact(url))
            raise UserError(f"{redact(url)}: cannot be opened: {type(error).__name__}: {reason}") from None
        except TimeoutError as error:
            raise Transient(f"no answer within {self._timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Transient(f"{type(error).__name__}: {error}".replace(url, redact(url))) from error
        finally:
            if response is not None:
                self._fs.loop.call_soon_threadsafe(response.close)

    def _read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """Return the first `limit` bytes of the body; fewer if it is shorter."""

        async def read() -> bytes:
            chunks, held = [], 0
            while held < limit and (chunk := await response.content.read(limit - held)):
                chunks.append(chunk)
                held += len(chunk)
            return b"".join(chunks)

        return sync(self._fs.loop, read)


def _check_status(response: aiohttp.ClientResponse, method: str, url: str, span: Span | None) -> None:
    status, answer = response.status, f"the server answers {response.status} {response.reason or ''}".rstrip()
    if status == 200 or (status == 206 and span is not None):
        return
    if status in (404, 410):
        raise Missing(f"{redact(url)}: no such file on the server ({answer}); check the address")
    if status == 416 and span is not None:
        raise _too_short(url, span, _content_range(response)[1])
    if status in (405, 501) and method == "HEAD":
        raise _HeadRefused(answer)
    if status in (408, 425, 429) or status >= 500:
        raise Transient(answer)
    raise UserError(f"{redact(url)}: {answer}; check the address and whether the file is open to you")


def _content_range(response: aiohttp.ClientResponse) -> tuple[int | None, int | None]:
    """Return the first byte and the total size of a Content-Range header; None for what it does not give."""
    header = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)", header)
    first, total = match.groups() if match else (None, None)
    return None if first is None else int(first), None if total is None else int(total)


def _too_short(url: str, span: Span, total: int | None) -> UserError:
    wanted = f"from {span[0]} on" if span[1] is None else f"{span[0]} to {span[1]}"
    return UserError(
        f"{redact(url)}: expected bytes {wanted}, but the file on the server holds "
        f"{'fewer' if total is None else total}; it is another file or was not uploaded whole"
    )


def _children(page: str, folder: str) -> set[str]:
    """Return the names of what lies directly in `folder`, from the links of a page."""
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


class _Store:
    """Requests to an object store through its fsspec package, each tried once."""

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

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        content = self._cat(url, start, stop)
        if len(content) != stop - start:
            size = self.size(url)
            if size is not None and size < stop:
                raise _too_short(url, (start, stop), size)
            raise Transient(f"{len(content)} bytes came where {stop - start} were asked for")
        return content

    def chunks(self, url: str, start: int, total: int | None) -> Generator[bytes]:
        total = self.size(url) if total is None else total
        if total is None:
            raise UserError(f"{redact(url)}: the store does not tell the file's size")
        for first in range(start, total, _STORE_CHUNK_BYTES):
            yield self.read_range(url, first, min(first + _STORE_CHUNK_BYTES, total))

    def names(self, url: str) -> set[str]:
        with _store_errors(url):
            return {path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(url, detail=False)}

    def _cat(self, url: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        with _store_errors(url):
            return bytes(self._fs.cat_file(url, start=start, end=stop))


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Sort the errors of s3fs, gcsfs and huggingface_hub; each has its own types, above those of its own client."""
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(f"{redact(url)}: no such file in the store ({error}); check the address") from error
    except (PermissionError, NotImplementedError, ValueError) as error:
        raise UserError(f"{redact(url)}: {type(error).__name__}: {error}; check the address and your access") from error
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | EOFError):
            raise  # a bug, ours or the package's
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{redact(url)}: status {status}: {error}; check your access") from error
        raise Transient(f"{type(error).__name__}: {error}") from error

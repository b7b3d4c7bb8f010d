"""Requests for files over HTTP and to object stores, on fsspec, each tried once; remote.py repeats those that fail.

HTTP goes through fsspec's session, but the requests are written out: fsspec's own reads take a whole file into memory
when a server ignores the range, and take any body for the range asked for.
"""

import os
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cache
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp
import fsspec
from fsspec.asyn import iothread, reset_lock, sync

from data_pipeline.errors import UserError

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

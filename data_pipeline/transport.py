"""Requests for files behind a URL, each tried once: over HTTP, and to object stores (s3, gs, hf) through fsspec.

HTTP uses the session of fsspec but is written out here: fsspec's own reads take a whole file into memory when a server
ignores the range, and take any body for the range that was requested. A body of the wrong length is a Transient error.
The content is not looked at.
"""

import os
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

import fsspec
from fsspec.asyn import iothread, reset_lock, sync

from data_pipeline.errors import UserError

if TYPE_CHECKING:  # imported below where it is used, since local shards do not need it
    import aiohttp

EXTRAS = {"s3": "s3", "gs": "gcs"}  # scheme -> our extra that installs its package; the others need none
_CHUNK_BYTES = 256 * 1024  # written at a time, at most
_STORE_CHUNK_BYTES = 8 * 2**20  # a request to an object store is a range of this size
_PAGE_BYTES = 16 * 2**20  # of the listing of a folder

Span = tuple[int, int | None]  # first byte and end of a range


class Missing(UserError):
    """The server has no such file."""


class Transient(Exception):
    """A failure that another attempt may not meet: a drop, a timeout, a 5xx, a body of the wrong length."""


class RangeIgnored(Transient):
    """The whole file came where a part was requested."""


class _HeadRefused(Transient):
    """The server accepts no HEAD requests."""


def redact(url: str) -> str:
    """Return the URL for messages, without the password or token that may stand before the host."""
    return re.sub(r"//[^/]*@", "//***@", url, count=1)


_locks: dict[int, threading.Lock] = {}  # by process: a forked child's copy of a held lock would never be released
_open: "dict[tuple[int, str, float], Transport]" = {}


def transport(scheme: str, timeout_seconds: float) -> "Transport":
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
        import aiohttp

        self._timeout_seconds = timeout_seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
        client = {
            "timeout": timeout,
            "trust_env": True,  # proxies from the environment, as curl takes them
            "auto_decompress": False,  # a compressed body would have another length than the file
            "headers": {"Accept-Encoding": "identity"},
        }
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
                total = _check_start(response, start)
                if total is not None and total < stop:
                    raise _too_short(url, (start, stop), total)
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
                position, announced = start, _check_start(response, start)
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
            kind = response.content_type
            if kind != "text/html":
                raise UserError(f"{redact(url)}: expected a page that lists the folder, got {kind}")
            page = self._read(response, _PAGE_BYTES)
        return _children(page.decode("utf-8", "replace"), url + "/")

    @contextmanager
    def _request(self, method: str, url: str, span: Span | None = None) -> "Iterator[aiohttp.ClientResponse]":
        """Yield a response with status 200 or 206. Failures of the network within the block become Transient.

        What was not read of the response at the end of the block is dropped.
        """
        import aiohttp

        headers = {} if span is None else {"Range": f"bytes={span[0]}-{'' if span[1] is None else span[1] - 1}"}

        async def send() -> "aiohttp.ClientResponse":
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

    def _read(self, response: "aiohttp.ClientResponse", limit: int) -> bytes:
        """Return the first `limit` bytes of the body; fewer if it is shorter."""

        async def read() -> bytes:
            chunks, held = [], 0
            while held < limit and (chunk := await response.content.read(limit - held)):
                chunks.append(chunk)
                held += len(chunk)
            return b"".join(chunks)

        return sync(self._fs.loop, read)


def _check_status(response: "aiohttp.ClientResponse", method: str, url: str, span: Span | None) -> None:
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


def _content_range(response: "aiohttp.ClientResponse") -> tuple[int | None, int | None]:
    """Return the first byte and the total size of a Content-Range header; None for what it does not give."""
    header = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)", header)
    first, total = match.groups() if match else (None, None)
    return None if first is None else int(first), None if total is None else int(total)


def _check_start(response: "aiohttp.ClientResponse", start: int) -> int | None:
    """Return the size of the file, None if the response does not give it. Transient for bytes from another place."""
    first, total = _content_range(response)
    if first != start:
        raise Transient(f"bytes from {first} on came where those from {start} on were asked for")
    return total


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

    def size(self, url: str) -> int:
        with _store_errors(url):
            return int(self._fs.info(url)["size"])

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        with _store_errors(url):
            content = bytes(self._fs.cat_file(url, start=start, end=stop))
        if len(content) != stop - start:
            size = self.size(url)
            if size < stop:
                raise _too_short(url, (start, stop), size)
            raise Transient(f"{len(content)} bytes came where {stop - start} were asked for")
        return content

    def chunks(self, url: str, start: int, total: int | None) -> Generator[bytes]:
        total = self.size(url) if total is None else total
        for first in range(start, total, _STORE_CHUNK_BYTES):
            yield self.read_range(url, first, min(first + _STORE_CHUNK_BYTES, total))

    def names(self, url: str) -> set[str]:
        with _store_errors(url):
            return {path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(url, detail=False)}


Transport = _Http | _Store


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Turn an error of s3fs, gcsfs or huggingface_hub into Missing, UserError or Transient.

    Each package raises its own exception classes and those of its HTTP client.
    """
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

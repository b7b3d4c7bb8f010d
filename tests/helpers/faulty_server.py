"""A real HTTP server on loopback that serves a folder and fails when told to.

    with FaultyServer(folder) as server:
        server.fail("data/a.hdf5", "drop", first=2, times=1)  # the second request for this file breaks off half way
        RemoteFile(f"{server.url}/data/a.hdf5").read(limit)
        assert server.requests["data/a.hdf5"] == 3

HEAD and GET with ranges; folders answer with a page of links. Faults, as `kind`:
    drop       sends half of the body it announced, then closes the connection
    truncate   sends half of the body and announces just that: only the wrong Content-Length tells
    html       a page of HTML with status 200 (HEAD, too)
    no_range   the whole file with status 200, whatever was asked for
    corrupt    one byte of the body is another
    shift      a 206 with as many bytes as were asked for, from one byte further on, and a header that says so
    slow       waits `seconds` before it answers
    stall      sends half of the body, waits `seconds`, then closes the connection
    404 ...    any other number: that status
"""

import html
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote

PAGE = b"<!doctype html><html><body><h1>Please try again later</h1></body></html>"


@dataclass
class Fault:
    """Strikes the requests number first, ..., first + times - 1 (from 1) of `method` for paths that match."""

    path: str  # relative to the folder; "*" matches every path
    kind: str
    first: int
    times: float
    method: str
    seconds: float
    seen: int = 0


class FaultyServer:
    """Use as a context manager. Paths are relative to `folder`, without a leading slash.

    requests: GET requests by path; heads: HEAD requests by path; sent: bytes of GET bodies of files sent by path,
    pages of HTML apart.
    ranges: (path, Range header or None) of each GET, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.ranges: list[tuple[str, str | None]] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(
        self, path: str, kind: str, first: int = 1, times: float = 1, method: str = "GET", seconds: float = 0.0
    ) -> None:
        """Adds a fault; several for one path strike in the order added. times=float("inf"): from `first` on, always."""
        with self._lock:
            self._faults.append(Fault(path, kind, first, times, method, seconds))

    def heal(self) -> None:
        """Removes all faults."""
        with self._lock:
            self._faults.clear()

    def reset(self) -> None:
        """Sets all counters to zero."""
        with self._lock:
            for counter in (self.requests, self.heads, self.sent):
                counter.clear()
            self.ranges.clear()

    @property
    def total_requests(self) -> int:
        return self.requests.total()

    @property
    def total_sent(self) -> int:
        return self.sent.total()

    def count(self, path: str, method: str, span: str | None) -> Fault | None:
        """Counts a request; the fault that strikes it, if any."""
        with self._lock:
            (self.heads if method == "HEAD" else self.requests)[path] += 1
            if method == "GET":
                self.ranges.append((path, span))
            struck = None
            for fault in self._faults:
                if fault.path in ("*", path) and fault.method in ("*", method):
                    fault.seen += 1
                    if struck is None and fault.first <= fault.seen < fault.first + fault.times:
                        struck = fault
            return struck

    def count_sent(self, path: str, num_bytes: int) -> None:
        with self._lock:
            self.sent[path] += num_bytes

    def __enter__(self) -> "FaultyServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error of the server's; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as real servers do

    def __init__(self, faulty: FaultyServer, *arguments: object) -> None:
        self.faulty = faulty
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/")
        span = self.headers.get("Range")
        fault = self.faulty.count(path, self.command, span)
        kind = fault.kind if fault else ""
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        target = (self.faulty.folder / path).resolve()
        if kind.isdigit():
            self._send(int(kind), b"", path)
        elif kind == "html":
            self._send(200, PAGE, path, kind="text/html")
        elif not target.is_relative_to(self.faulty.folder.resolve()) or not target.exists():
            self._send(404, b"no such file", path)
        elif target.is_dir():
            self._send(200, _listing(target), path, kind="text/html")
        else:
            self._send_file(target, path, None if kind == "no_range" else span, kind, fault.seconds if fault else 0.0)

    def _send_file(self, target: Path, path: str, span: str | None, fault: str, seconds: float) -> None:
        size = target.stat().st_size
        start, stop = _limits(span, size)
        if fault == "shift" and span is not None:
            start, stop = start + 1, stop + 1
        if start >= stop and size:
            self._send(416, b"", path, content_range=f"bytes */{size}")
            return
        with target.open("rb") as file:
            file.seek(start)
            body = file.read(stop - start)
        if fault == "corrupt" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        content_range = None if span is None else f"bytes {start}-{stop - 1}/{size}"
        self._send(200 if span is None else 206, body, path, content_range=content_range, fault=fault, seconds=seconds)

    def _send(
        self,
        status: int,
        body: bytes,
        path: str,
        kind: str = "application/octet-stream",
        content_range: str | None = None,
        fault: str = "",
        seconds: float = 0.0,
    ) -> None:
        if fault == "truncate":
            body = body[: len(body) // 2]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("drop", "stall"):
            body = body[: len(body) // 2]
        try:
            for begin in range(0, len(body), 2**16):
                piece = body[begin : begin + 2**16]
                if kind != "text/html":
                    self.faulty.count_sent(path, len(piece))  # before: the client may look as soon as it has them
                self.wfile.write(piece)
        except (BrokenPipeError, ConnectionResetError):  # the client has what it wanted
            self.close_connection = True
        if fault in ("drop", "stall"):
            time.sleep(seconds or 0.05)  # what was sent arrives first, so that tests can count on it
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing: the counters tell."""


def _limits(span: str | None, size: int) -> tuple[int, int]:
    """First byte and end of a Range header of the form bytes=a-b or bytes=a-."""
    if span is None:
        return 0, size
    first, _, last = span.removeprefix("bytes=").partition("-")
    return int(first), min(size, int(last) + 1) if last else size


def _listing(folder: Path) -> bytes:
    """A page as Apache makes it, with a link to the parent and links that sort."""
    names = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir())]
    links = [f'<a href="{quote(name)}">{html.escape(name)}</a>' for name in names]
    return (
        "<html><body><a href='../'>..</a><a href='?C=N;O=D'>Name</a>" + "\n".join(links) + "</body></html>"
    ).encode()

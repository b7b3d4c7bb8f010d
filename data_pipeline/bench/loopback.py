"""A folder behind a URL of this machine, served by a process of its own, with byte ranges."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a folder while a process serves it on this machine alone."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(folder, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a process that ends before it serves is an EOFError below, not a wait for ever
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, ready: Connection) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_RangeHandler, directory=str(folder))) as server:
        ready.send(server.server_address[1])
        server.serve_forever()


class _RangeHandler(SimpleHTTPRequestHandler):
    """Files with byte ranges, which the standard library's handler does not serve."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size, match = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, stop = (int(match[1]), min(int(match[2] or size) + 1, size)) if match else (0, size)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(stop - first))
        self.send_header("Accept-Ranges", "bytes")
        if match:
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        self.end_headers()
        if body and stop > first:
            with path.open("rb") as file:
                self.connection.sendfile(file, first, stop - first)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

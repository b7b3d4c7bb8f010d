"""A stand-in for the Hugging Face Hub on loopback: real requests, files kept in memory.

    with HubServer() as hub:
        environment = hub.environment(cache)  # for a process; huggingface_hub reads it when it is imported

It speaks what huggingface_hub says to create a repository, upload a folder in a commit (safetensors and pictures as
large files, the rest inside the commit) and download a snapshot. One branch, main; a commit is the hash of its files.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pt2", ".png")


class HubServer:
    """repositories: name -> commits, oldest first, each a dictionary from path to content."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded large files by SHA-256
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on nobody answers."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that takes this for the Hub and has its cache under `home`."""
        given = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}
        given |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **given}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            files = self._files(*match.groups())
            if files is not None:
                self._json({"id": match[1], "sha": _commit(files), "siblings": [{"rfilename": name} for name in files]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self._files(*match.groups())
            if files is not None:
                self._json([_entry(name, data) for name, data in files.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self._files(match[1], match[2])
            if files is not None and match[3] not in files:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif files is not None:
                data = files[match[3]]
                headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": _commit(files)}
                self._answer(200, data, headers)
        else:
            self._answer(404, b"{}")

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if self.headers.get("Authorization") != "Bearer hf_loopback":
            self._answer(401, b"{}")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.hub.repositories else 200
            self.hub.repositories.setdefault(name, [{}])
            self._json({"url": f"{self.hub.url}/{name}"}, status)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": file["path"], "uploadMode": modes[file["path"].endswith(LARGE)], "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, b"{}")

    def do_PUT(self) -> None:
        data, name = self._body(), self._path().removeprefix("/blobs/")
        whole = hashlib.sha256(data).hexdigest() == name
        if whole:
            self.hub.blobs[name] = data
        self._answer(200 if whole else 400, b"")

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.repositories[name][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repositories[name].append(files)
        commit = _commit(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a commit; answers itself where there is none."""
        commits = self.hub.repositories.get(name)
        if commits is None:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        by_name = {"main": commits[-1], **{_commit(files): files for files in commits}}
        if unquote(revision) not in by_name:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return by_name.get(unquote(revision))

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):  # chunked
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _commit(files: dict[str, bytes]) -> str:
    content = "\n".join(f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))
    return hashlib.sha1(content.encode()).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    large = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 134}} if name.endswith(LARGE) else {}
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest(), **large}

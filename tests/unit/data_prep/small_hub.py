"""A server on this machine that answers the few requests of the Hugging Face Hub by which data sets are listed and read.

In: directories, one for each commit of a data set. Out: an endpoint for HF_ENDPOINT, and a log of the requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class SmallHub:
    """One data set. `commits`: its directories by commit; `main` is the newest."""

    name: str
    commits: dict[str, Path]
    main: str
    log: list[str] = field(default_factory=list)  # PATH, or PATH RANGE
    answer: tuple[int, str] | None = None  # status and X-Error-Code of every answer, instead of the data
    fail_after: int | None = None  # requests of data that are answered before each further one gets `answer`

    def __enter__(self) -> SmallHub:
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server_of: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, url = self.server_of, urlparse(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.log.append(" ".join(filter(None, (path, self.headers.get("Range")))))
        is_data = self.command == "GET" and path.endswith((".parquet", ".gz"))
        if hub.answer is not None and (hub.fail_after is None or (is_data and hub.fail_after <= 0)):
            self._send(hub.answer[0], b"", {"X-Error-Code": hub.answer[1]})
            return
        if is_data and hub.fail_after is not None:
            hub.fail_after -= 1
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
        if path.startswith(files):
            self._file(*path.removeprefix(files).split("/", 1))
        elif not path.startswith(api):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            words = path.removeprefix(api).strip("/").split("/", 2)
            self._api(words, parse_qs(url.query), body)

    def _api(self, words: list[str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.server_of
        commit = hub.main if words in ([""], ["revision", "main"]) else words[1]
        if commit not in hub.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        root = hub.commits[commit]
        if words[0] in ("", "revision"):
            self._send_json({"id": hub.name, "sha": commit, "siblings": []})
        elif words[0] == "tree":
            above = root / "/".join(words[2:])
            found = above.rglob("*") if query.get("recursive", ["false"])[0].lower() == "true" else above.glob("*")
            self._send_json([_entry(root, path) for path in sorted(found)], above.is_dir())
        else:
            asked = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            self._send_json([_entry(root, root / path) for path in asked if (root / path).exists()])

    def _file(self, commit: str, name: str) -> None:
        hub = self.server_of
        commit = hub.main if commit == "main" else commit
        if commit not in hub.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        path = hub.commits[commit] / name
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        data, status = path.read_bytes(), 200
        headers |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            start, end = wanted.removeprefix("bytes=").split("-")
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[int(start) : int(end or len(data)) + 1], 206
        self._send(status, data, headers)

    def _send_json(self, found: Any, exists: bool = True) -> None:
        if exists:
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(root: Path, path: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    digest = hashlib.sha1(str(path).encode()).hexdigest()
    return {
        "type": kind,
        "path": str(path.relative_to(root)),
        "oid": digest,
        "size": 0 if path.is_dir() else path.stat().st_size,
    }

"""A server on this machine that answers the few requests of the Hugging Face Hub by which data sets are listed and read.

In: directories, one for each commit of a data set. Out: an endpoint for HF_ENDPOINT, and a log of the requests. The server is a
process of its own, because `prepare` forks and its process must have no threads. A file tells it what to answer.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest


@dataclass
class SmallHub:
    """One data set, and what the server does with it. `change` tells the server."""

    directory: Path  # of the server's own files
    name: str
    commits: dict[str, str]  # the directory of each commit
    main: str  # the newest commit
    answer: tuple[int, str] | None = None  # status and X-Error-Code of every answer, instead of the data
    fail_after: int | None = None  # requests of data that are answered before each further one gets `answer`
    endpoint: str = field(default="", init=False)

    @contextmanager
    def running(self) -> Iterator[SmallHub]:
        self.change()
        server = subprocess.Popen([sys.executable, __file__, str(self._state)], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        self.endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        try:
            yield self
        finally:
            server.kill()
            server.wait()
            server.stdout.close()

    @property
    def _state(self) -> Path:
        return self.directory / "state.json"

    def change(self, **values: Any) -> None:
        """Set fields, and begin a new log."""
        for name, value in values.items():
            setattr(self, name, value)
        self.directory.mkdir(exist_ok=True)
        (self.directory / "log").write_text("")
        state = {name: value for name, value in asdict(self).items() if name not in ("directory", "endpoint")}
        self._state.write_text(json.dumps(state))

    @property
    def log(self) -> list[str]:
        """The requests since the last change: PATH, or PATH RANGE."""
        return (self.directory / "log").read_text().splitlines()

    def environment(self) -> dict[str, str]:
        """For a process that uses this hub."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.directory / "home")}

    def use_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the libraries in this process use this hub, which read the environment when they were imported."""
        import datasets
        from huggingface_hub import HfFileSystem, constants

        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.directory / "home" / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", self.directory / "home" / "datasets")
        HfFileSystem.clear_instance_cache()


class _Handler(BaseHTTPRequestHandler):
    state: Path
    hub: SmallHub
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
        hub = self.hub = SmallHub(self.state.parent, **json.loads(self.state.read_text()))
        url = urlparse(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_data = self.command == "GET" and path.endswith((".parquet", ".gz"))
        with open(self.state.parent / "log", "a") as log:
            log.write(" ".join(filter(None, (path, self.headers.get("Range")))) + "\n")
        num_answered = sum(".parquet bytes" in line or ".gz bytes" in line for line in hub.log) - 1
        if hub.answer is not None and (hub.fail_after is None or (is_data and num_answered >= hub.fail_after)):
            self._send(hub.answer[0], b"", {"X-Error-Code": hub.answer[1]})
            return
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
        if path.startswith(files):
            self._file(*path.removeprefix(files).split("/", 1))
        elif not path.startswith(api):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            words = path.removeprefix(api).strip("/").split("/", 2)
            self._api(words, parse_qs(url.query), body)

    def _api(self, words: list[str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.hub
        commit = hub.main if words in ([""], ["revision", "main"]) else words[1]
        if commit not in hub.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        root = Path(hub.commits[commit])
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
        hub = self.hub
        commit = hub.main if commit == "main" else commit
        if commit not in hub.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        path = Path(hub.commits[commit]) / name
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


if __name__ == "__main__":
    _Handler.state = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()

"""A stand-in for the Hugging Face hub on localhost, which HF_ENDPOINT names; it can fail in the ways that the real one does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers import ROOT

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_aTokenThatMustNeverBePrinted"
PIECE = 1 << 16


class HubServer(ThreadingHTTPServer):
    """`files` of one repository, {path: bytes}. Faults are set while it runs:

    dropped, truncated, wrong: {path: how many times}: the connection is cut in the middle; the answer ends early but
    in order; a byte differs. status: {path, or "" for the listing: HTTP status and the hub's error code}.
    busy: {path or "": how many times 429 is answered first}. circle: paths that redirect to themselves.
    pause_at: {path: bytes after which nothing more comes until `go_on` is set}. listed_bytes: {path: size in the listing}.
    """

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes], type: str = "model", gated: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, self.files, self.type, self.gated, self.commit = repository, files, type, gated, COMMIT
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self.circle: set[str] = set()
        self.requests: Counter[str] = Counter()  # of each path, "" for the listing
        self.status: dict[str, tuple[int, str]] = {}
        self.pause_at: dict[str, int] = {}
        self.listed_bytes: dict[str, int] = {}
        self.paused, self.go_on = threading.Event(), threading.Event()
        self.sent: Counter[str] = Counter()  # bytes of each file

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients that were killed are no news."""

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """Variables of a process that takes this for the hub; none of the caller's own."""
        fixed = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
        return fixed | {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}"} | changes

    def command(self, script: str, *arguments: object) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]

    def run(self, script: str, *arguments: object, home: Path, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment(home, **changes)
        result = subprocess.run(self.command(script, *arguments), env=environment, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in result.stderr, result.stderr
        assert TOKEN not in result.stdout + result.stderr
        return result

    def lfs(self, path: str) -> bool:
        return not path.endswith((".json", ".yaml", ".md"))

    def etag(self, path: str) -> str:
        data = self.files[path]
        return hashlib.sha256(data).hexdigest() if self.lfs(path) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.server
        prefix = "datasets/" if hub.type == "dataset" else ""
        path = self.path.split("?")[0]
        if match := re.fullmatch(rf"/api/{hub.type}s/{hub.repository}/(revision|tree)/([^/]+)", path):
            self.listing(*match.groups())
        elif match := re.fullmatch(rf"/{prefix}{hub.repository}/resolve/{hub.commit}/(.+)", path):
            self.file(match[1])
        else:  # as the hub answers those without a token, so as not to tell which names exist
            self.error(401, "RepoNotFound")

    def refused(self, path: str) -> bool:
        hub = self.server
        token = self.headers.get("Authorization", "")
        hub.requests[path] += 1
        if hub.busy[path] > 0:
            hub.busy[path] -= 1
            self.reply(429, b"", {"Retry-After": "1"})
        elif path in hub.circle:
            self.reply(302, b"", {"Location": self.path})
        elif path in hub.status:
            self.error(*hub.status[path])
        elif hub.gated and not token:
            self.error(401, "GatedRepo")
        elif token and token != f"Bearer {TOKEN}":
            self.error(401, "", "Invalid credentials in Authorization header")
        else:
            return False
        return True

    def error(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(status, b"", {name: value for name, value in headers.items() if value})

    def listing(self, what: str, revision: str) -> None:
        hub = self.server
        if self.refused(""):
            return
        if revision not in ("main", hub.commit):
            self.error(404, "RevisionNotFound")
        elif what == "revision":
            self.reply(200, json.dumps({"id": hub.repository, "sha": hub.commit, "siblings": []}).encode())
        else:
            self.reply(200, json.dumps([self.entry(path) for path in hub.files]).encode())

    def entry(self, path: str) -> dict[str, Any]:
        size, etag = self.server.listed_bytes.get(path, len(self.server.files[path])), self.server.etag(path)
        entry = {"type": "file", "path": path, "size": size, "oid": etag}
        if self.server.lfs(path):
            entry |= {"oid": "0" * 40, "lfs": {"oid": etag, "size": size, "pointerSize": 134}}
        return entry

    def file(self, path: str) -> None:
        hub = self.server
        if self.refused(path):
            return
        if path not in hub.files:
            self.error(404, "EntryNotFound")
            return
        data, first = hub.files[path], 0
        if hub.wrong[path] > 0 and self.command == "GET":
            hub.wrong[path] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(match[1])
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{hub.etag(path)}"', "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.reply(206 if first else 200, data[first:], headers, path)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str = "") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.send(body, path)

    def send(self, body: bytes, path: str) -> None:
        """The body, or what the faults leave of it."""
        hub, end = self.server, len(body)
        if hub.dropped[path] > 0 or hub.truncated[path] > 0:
            fault = hub.dropped if hub.dropped[path] > 0 else hub.truncated
            fault[path] -= 1
            end //= 2
            self.close_connection = True
        for start in range(0, end, PIECE):
            if path in hub.pause_at and hub.sent[path] >= hub.pause_at[path]:
                hub.paused.set()
                hub.go_on.wait()
            piece = body[start : min(start + PIECE, end)]
            self.wfile.write(piece)
            if path:
                hub.sent[path] += len(piece)

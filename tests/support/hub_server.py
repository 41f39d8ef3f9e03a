"""A hub on the loopback: one repository, served as huggingface_hub expects, as badly as asked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What the server has, how it behaves, and what it was asked."""

    folder: Path
    repo: str = "someone/tower"
    ranges: bool = True  # serves parts of files
    range_status: int | None = None  # answers every range request with this status
    cut_after: list[int] = field(default_factory=list)  # bytes after which the next bodies are cut
    fail_first: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # for shards
    pause: float = 0.0  # seconds before every piece of a shard
    token: str | None = None  # needed to read anything
    gated: bool = False
    cdn: bool = False  # sends those who want a shard to another host
    cdn_tokens: set[str | None] = field(default_factory=set)  # that arrived there
    longest_range: int | None = None  # serves no more than this of a range at a time
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    sent: Counter[str] = field(default_factory=Counter)  # body bytes by file

    def shard_bytes(self) -> int:
        sent = list(self.sent.items())  # other threads add to it
        return sum(count for file, count in sent if file.endswith(".safetensors"))

    def forget(self) -> None:
        self.requests.clear()
        self.sent.clear()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub = self.hub
        wanted = self.headers.get("Range")
        hub.requests.append((self.command, self.path, wanted))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if self.path.startswith("/cdn/"):
            hub.cdn_tokens.add(token)
            name = self.path.removeprefix("/cdn/")
            return self.send_file(hub.folder / name, wanted, body=body, shard=True)
        found = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", unquote(self.path))
        if found:  # the hub's client asks for other things too, for its own purposes
            hub.tokens.add(token)
        if not found or found[1] != hub.repo or (hub.token and token != hub.token):
            return self.fail(401 if hub.token else 404, "RepoNotFound")
        if found[2] not in ("main", COMMIT):
            return self.fail(404, "RevisionNotFound")
        if hub.gated:
            return self.fail(403, "GatedRepo")
        file = hub.folder / found[3]
        if not file.is_file():
            return self.fail(404, "EntryNotFound")
        shard = file.suffix == ".safetensors"
        if shard and body and hub.fail_first:
            status, headers = hub.fail_first.pop(0)
            return self.fail(status, "", headers)
        if wanted and body and hub.range_status:
            return self.fail(hub.range_status, "")
        if shard and body and hub.cdn:
            port = hub.url.rsplit(":", 1)[1]
            return self.fail(302, "", {"Location": f"http://localhost:{port}/cdn/{file.name}"})
        self.send_file(file, wanted if hub.ranges else None, body=body, shard=shard)
        return None

    def fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        text = json.dumps({"error": code or f"status {status}"}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def send_file(self, file: Path, wanted: str | None, *, body: bool, shard: bool) -> None:
        data = file.read_bytes()
        size, begin, end = len(data), 0, len(data)
        if wanted and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)):
            begin = int(found[1])
            end = min(int(found[2]) + 1 if found[2] else size, size)
            end = min(end, begin + (self.hub.longest_range or size))
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes" if self.hub.ranges else "none")
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if body:
            self.send_body(file.name, data[begin:end], shard=shard)

    def send_body(self, name: str, data: bytes, *, shard: bool) -> None:
        # Headers are far below this, so that a cut falls into the tensors.
        cut = (
            self.hub.cut_after.pop(0)
            if shard and len(data) > 65536 and self.hub.cut_after
            else None
        )
        for start in range(0, len(data), 65536):
            piece = data[start : start + 65536]
            if cut is not None and start + len(piece) > cut:
                self.wfile.write(piece[: cut - start])
                self.hub.sent[name] += cut - start
                self.close_connection = True
                return
            if shard and self.hub.pause:
                time.sleep(self.hub.pause)
            try:
                self.wfile.write(piece)
            except OSError:  # the client hung up
                self.close_connection = True
                return
            self.hub.sent[name] += len(piece)

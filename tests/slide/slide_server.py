"""A web server for tests, which can break transfers off, stall, replace files, and refuse ranges."""

from __future__ import annotations

import base64
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from maskattn.slide.remote import cache, fetch, files, stores, transfer


class SlideServer:
    """Files by path, how they are served, and what was asked for."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.hidden = False
        """Whether folders are not listed."""
        self.broken_after: list[int] = []
        """For each of the next GETs of a file, after how many bytes it is broken off."""
        self.stalled_after: list[int] = []
        self.md5: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        """(method, path) of each request."""
        self.sent = 0
        self.parts: dict[str, int] = {}
        """How many parts of each file were asked for."""
        self.on_part: Callable[[str, int], str] = lambda path, number: ""
        """What goes wrong with a file's part of that number: "dies", "whole" or "short"; "" for nothing."""
        self.latency_s = 0.0
        self.before_end: Callable[[str], None] = lambda path: None

    def got(self, path: str) -> int:
        return self.asked.count(("GET", path))


@functools.lru_cache(maxsize=8)
def _etag_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: SlideServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.state.asked.append(("HEAD", self.path))
        time.sleep(self.state.latency_s)
        self._head()

    def do_GET(self) -> None:
        self.state.asked.append(("GET", self.path))
        time.sleep(self.state.latency_s)
        data = self._head()
        if data is None:
            return
        state = self.state
        if self.path.endswith("/"):
            self.wfile.write(data)
            return
        end, stalled = len(data), False
        if state.broken_after:
            end = min(end, state.broken_after.pop(0))
        elif state.stalled_after:
            end, stalled = state.stalled_after.pop(0), True
        state.sent += end
        try:
            self.wfile.write(data[:end])
        except ConnectionError:  # it is not wanted any more
            self.close_connection = True
            return
        if stalled:
            time.sleep(1.5)
        state.before_end(self.path)
        if end < len(data):
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def _head(self) -> bytes | None:
        state, path = self.state, self.path.partition("?")[0]
        if path.endswith("/") and not state.hidden:
            names = [name[len(path) :] for name in state.files if name.startswith(path)]
            data = "".join(f'<a href="{name}">{name}</a>' for name in names if "/" not in name).encode()
            self._answer(200, {"Content-Type": "text/html", "Content-Length": str(len(data))})
            return data
        if path not in state.files:
            self._answer(404, {"Content-Length": "0"})
            return None
        asked, status, fault = self.headers.get("Range"), 200, ""
        if asked:
            state.parts[path] = state.parts.get(path, 0) + 1
            fault = state.on_part(path, state.parts[path])
            if fault == "dies":
                self.close_connection = True
                self.connection.shutdown(2)
                return None
        data = state.files[path]
        headers = {"ETag": f'"{_etag_of(data)}"', "Content-Type": "image/tiff"}
        if path in state.md5:
            headers["Content-MD5"] = base64.b64encode(bytes.fromhex(state.md5[path])).decode()
        if asked and state.ranges and fault != "whole":
            start, _, end = asked.removeprefix("bytes=").partition("-")
            last = int(end or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            data, status = data[int(start) : last + 1 - (fault == "short")], 206
        self._answer(status, {**headers, "Content-Length": str(len(data))})
        return data

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serving() -> Iterator[SlideServer]:
    """Serve files on a port of this machine."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.state = SlideServer(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield handler.state
        finally:
            server.shutdown()
            thread.join()


def be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stores be given up after tenths of seconds instead of minutes."""
    for module in (files, transfer):
        monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(stores, "SILENT_S", 0.5)
    monkeypatch.setattr(fetch, "_PATIENCE_S", 5.0)
    monkeypatch.setattr(cache, "_WAIT_S", 0.02)
    monkeypatch.setattr(transfer, "_BLOCK_BYTES", 4096)
    stores._store.cache_clear()


def left_in(folder: Path) -> list[Path]:
    """What a cache holds."""
    return sorted(folder.rglob("*"))

"""Requests that nobody should send: ``python tests/viewer/fuzz_addresses.py OUT [COUNT] [SEED]``.

Every one must be answered by HTTP with a status below 500 and, where it is an error, a sentence; none may bring a
byte of the files beside the folder of outputs; and the viewer must answer its page afterwards.
"""

from __future__ import annotations

import json
import random
import socket
import sys
from collections import Counter
from pathlib import Path

SECRET = b"the-secret-of-another-folder"
_PARTS = (
    *("api", "slides", "maps", "squares", "tiles", "at", "assets", "run", "index.html", "app.js", "secret.txt"),
    *("..", ".", "", "...", "%2e%2e", "%2e%2e%2f", "..%5c..", "%252e%252e", "\\..", "..;", "~", "~root", "-", "*"),
    *("0", "1", "2", "3", "-1", "00", "1e9", "0x1", "999999999", "9" * 30, "9" * 4000, "NaN", "inf", "1.5", "٣"),
    *("0_0.jpg", "99_99.jpg", "-1_0.jpg", "0_0.f32", "1_1.f32", "9_9.f32", "100_100", "210.5_260.25", "-5_7", "1_2_3"),
    *("%00", "%ff%fe", "\udcff\udc80", "<script>", "'\"", "%3Cscript%3E", "$(id)", "{{7*7}}", "etc/passwd", "C:\\"),
)
_SHAPES = (
    "/api/slides/{}", "/api/slides/{}/squares/{}/{}", "/api/slides/{}/maps/{}", "/api/slides/{}/maps/{}/{}/{}",
    "/api/slides/{}/at/{}", "/api/slides/{}/tiles/{}.jpg", "/assets/{}", "/{}", "/{}/{}/{}/{}", "//{}/{}", "{}",
    "/{}?{}={}", "http://{}/{}", "/assets/../{}", "/assets/..%2f..%2f{}", "/{}#{}",
)  # fmt: skip
_GOOD = (
    "/", "/api/run", "/api/slides/0", "/api/slides/0/maps/1", "/api/slides/0/maps/2/0/0_0.f32", "/assets/app.js?v=1",
    "/api/slides/0/at/210.5_260.25", "/api/slides/0/tiles/3.jpg", "/api/slides/0/squares/8/0_0.jpg",
)  # fmt: skip
_METHODS = ("GET",) * 12 + ("HEAD", "POST", "PUT", "OPTIONS", "get", "G\udcffT", "")


def request_of(rng: random.Random, own_host: str) -> bytes:
    """One request, more or less well formed."""
    shape = rng.choice(_SHAPES)
    address = (
        rng.choice(_GOOD)
        if rng.random() < 0.1
        else shape.format(*(rng.choice(_PARTS) for _ in range(shape.count("{}"))))
    )
    hosts = (own_host,) * 10 + ("evil.example", "127.0.0.1.evil.example", "", "[::1", "\udcff")
    lines = [f"{rng.choice(_METHODS)} {address} HTTP/{rng.choice(('1.1',) * 8 + ('1.0', '9.9', ''))}"]
    lines += [f"Host: {rng.choice(hosts)}"] * rng.choice((1,) * 12 + (0, 2))
    if rng.random() < 0.1:
        lines.append(f"Sec-Fetch-Site: {rng.choice(('cross-site', 'same-site', 'same-origin', 'x'))}")
    if rng.random() < 0.05:
        lines.append(
            rng.choice(("Range: bytes=0-9999999999", "Content-Length: -5", "X: \udcff", ": no name", "X" * 5000))
        )
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("utf-8", "surrogateescape")


def answer_to(port: int, request: bytes) -> tuple[int, bytes]:
    """The status and the body; status 0 where the connection was closed without an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)  # nothing more comes, whatever became of the header that says so
        data = b""
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return (int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0), body


def check(port: int, count: int, seed: int) -> Counter[int]:
    """Send so many requests, check every answer, and count the statuses."""
    rng = random.Random(seed)
    statuses: Counter[int] = Counter()
    for _ in range(count):
        request = request_of(rng, f"127.0.0.1:{port}")
        status, body = answer_to(port, request)
        statuses[status] += 1
        assert 200 <= status < 500, (status, request, body[:300])
        assert SECRET not in body, request
        assert b"root:" not in body, request
        if status >= 400 and not request.startswith(b"HEAD"):
            sentence = json.loads(body)["error"]
            assert len(sentence) > 20, (request, sentence)
    status, body = answer_to(port, f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
    assert status == 200
    assert b"<title>maskattn</title>" in body
    return statuses


def main(out: str, count: str = "10000", seed: str = "0") -> None:
    """Serve a folder of outputs and send the requests."""
    from served import serving

    with serving(Path(out)) as server:
        statuses = check(server.server_port, int(count), int(seed))
    print(f"{count} requests: {', '.join(f'{statuses[status]} × {status}' for status in sorted(statuses))}")


if __name__ == "__main__":
    main(*sys.argv[1:])

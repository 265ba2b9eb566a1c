"""Reading a remote slide in parts and from a whole copy: ``python -m bench.cpu.remote_slides``, about two minutes.

A slide of some hundred MiB is drawn as an OME-TIFF of JPEG tiles, tissue from edge to edge, and served by a web server
of this machine that waits before each answer (``--latency-ms``) and sends no faster than a network (``--mbit``). All
tiles of a disc that takes a share f of the slide are read, row by row, in the slide's own pixels and at half its
resolution; no model runs. The two ways take turns. Seconds count from the URL to the last tile, or to the first one;
opening includes the start of the process that decodes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from bench.pages import publish
from maskattn.slide.manifest import SlideJob
from maskattn.slide.reader import SlideReader
from maskattn.slide.remote import CacheSettings, Copies, locate

SIDE_PX = 24_576
TILE_PX = 256
MODEL_PX = 256
SHARES = (0.3, 1.0)
STRIDES = (1, 2)
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Reading:
    """What one way took: MiB and requests, seconds to the first tile and to the last."""

    mib: float
    requests: int
    first_s: float
    all_s: float


def draw(path: Path) -> Path:
    """Write the slide: noise of two scales in the colours of a stain, with levels in SubIFDs."""
    rng = np.random.default_rng(0)
    coarse = cv2.resize(rng.normal(0, 30, (64, 64, 3)), (2048, 2048), interpolation=cv2.INTER_CUBIC)
    fine = cv2.GaussianBlur(rng.normal(0, 60, (2048, 2048, 3)), (0, 0), 1.2)
    texture = np.clip(np.array((200, 120, 165)) + coarse + fine, 0, 255).astype(np.uint8)
    how: dict[str, Any] = {"photometric": "rgb", "tile": (TILE_PX, TILE_PX), "compression": "jpeg", "dtype": np.uint8}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as writer:
        for level in range(4):
            side = SIDE_PX >> level
            own: dict[str, Any] = {"subfiletype": 1}
            if level == 0:
                spacing = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
                own = {"subifds": 3, "metadata": {"axes": "YXS", **spacing}}
            writer.write(_tiles(texture, side), shape=(side, side, 3), **own, **how)
    return path


def _tiles(texture: np.ndarray, side: int) -> Iterator[np.ndarray]:
    count, within = side // TILE_PX, len(texture) // TILE_PX
    for row in range(count):
        for column in range(count):
            top, left = row % within * TILE_PX, column % within * TILE_PX
            yield texture[top : top + TILE_PX, left : left + TILE_PX]


def tiles_of(share: float, step_px: int) -> list[tuple[int, int]]:
    """Return the corners of the tiles in a disc that takes this share of the slide, row by row."""
    starts = range(0, SIDE_PX, step_px)
    if share == 1:
        return [(x, y) for y in starts for x in starts]
    radius, centre = SIDE_PX * (share / np.pi) ** 0.5, SIDE_PX / 2
    return [
        (x, y)
        for y in starts
        for x in starts
        if (x + step_px / 2 - centre) ** 2 + (y + step_px / 2 - centre) ** 2 <= radius**2
    ]


def serve(folder: Path, latency_s: float, bytes_per_s: float) -> None:
    """Serve a folder; the path /count answers with the bytes and requests so far, and sets them to 0."""
    sent = {"bytes": 0, "requests": 0}

    class Handler(BaseHTTPRequestHandler):
        """Answers HEAD and GET, with ranges."""

        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            """Answer with the headers."""
            self._answer(False)

        def do_GET(self) -> None:
            """Answer with the file or its part."""
            self._answer(True)

        def _answer(self, whole: bool) -> None:
            if self.path == "/count":
                text = f"{sent['bytes']} {sent['requests']}".encode()
                sent.update(bytes=0, requests=0)
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                return
            time.sleep(latency_s)
            sent["requests"] += 1
            path = folder / self.path.lstrip("/")
            size = path.stat().st_size
            start, end = 0, size
            asked = self.headers.get("Range")
            self.send_response(206 if asked else 200)
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), int(last or size - 1) + 1
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("ETag", f'"{size}"')
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if not whole:
                return
            began = time.perf_counter()
            with path.open("rb") as file:
                file.seek(start)
                for at in range(start, end, CHUNK_BYTES):
                    data = file.read(min(CHUNK_BYTES, end - at))
                    self.wfile.write(data)
                    sent["bytes"] += len(data)
                    early = began + (at - start + len(data)) / bytes_per_s - time.perf_counter()
                    if early > 0:
                        time.sleep(early)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def read(url: str, cache: Path, share: float, stride: int, copy_whole: bool) -> Reading:
    """Read the tiles of a slide in one of the two ways."""
    from urllib.request import urlopen

    counted = f"{url.rpartition('/')[0]}/count"
    urlopen(counted).close()
    step_px = MODEL_PX * stride
    path, origin = locate(url)
    job = SlideJob("slide", path, origin=origin)
    began, first_s = time.perf_counter(), 0.0
    with (
        Copies(CacheSettings(cache, copy_whole=copy_whole)) as copies,
        copies.local(job) as here,
        SlideReader(here.path, isolated=True) as reader,
    ):
        for x, y in tiles_of(share, step_px):
            reader.read_region(x, y, (step_px, step_px), (MODEL_PX, MODEL_PX))
            first_s = first_s or time.perf_counter() - began
    all_s = time.perf_counter() - began
    with urlopen(counted) as answer:
        moved, requests = map(int, answer.read().split())
    return Reading(moved / 2**20, requests, first_s, all_s)


def lines_of(folder: Path, url: str, rounds: int, latency_ms: float, mbit: float) -> Iterable[str]:
    """Measure, and yield the page."""
    mib = (folder / "slide.ome.tif").stat().st_size / 2**20
    yield "# Remote slides: in parts, or copied whole\n"
    yield (
        f"`python -m bench.cpu.remote_slides`, {datetime.date.today()}, Python {platform.python_version()}, tifffile "
        f"{tifffile.__version__}, {os.cpu_count()} cores of {platform.machine()}.\n"
    )
    yield (
        f"A slide of {mib:.0f} MiB ({SIDE_PX:,} px square, JPEG, tissue from edge to edge) on a web server of this "
        f"machine that waits {latency_ms:g} ms before each answer and sends {mbit:g} Mbit/s at most. Tiles of "
        f"{MODEL_PX} px in a disc that takes the share f of the slide are read by one process; no model runs. Seconds "
        f"are medians of {rounds}, with the two ways in turn.\n"
    )
    yield "| f | read at | way | MiB moved | requests | first tile, s | all tiles, s |"
    yield "|---:|---|---|---:|---:|---:|---:|"
    for share in SHARES:
        for stride in STRIDES:
            found: dict[bool, list[Reading]] = {True: [], False: []}
            for _ in range(rounds):
                for copy_whole, readings in found.items():
                    readings.append(read(url, folder / "cache", share, stride, copy_whole))
            for copy_whole, readings in found.items():
                first_s = statistics.median(one.first_s for one in readings)
                all_s = statistics.median(one.all_s for one in readings)
                at, way = ("own resolution", "half")[stride - 1], "copied whole" if copy_whole else "in parts"
                moved = f"{readings[0].mib:.0f} | {readings[0].requests}"
                yield f"| {share:g} | {at} | {way} | {moved} | {first_s:.1f} | {all_s:.1f} |"


def main() -> None:
    """Parse the arguments, serve, measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--mbit", type=float, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the slide here for the next time")
    parser.add_argument("--out", type=Path, help="also writes the page here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, given.latency_ms / 1000, given.mbit * 1e6 / 8)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        slide = folder / "slide.ome.tif"
        if not slide.exists():
            draw(slide)
        limits = ["--latency-ms", str(given.latency_ms), "--mbit", str(given.mbit)]
        command = [sys.executable, "-m", "bench.cpu.remote_slides", "--serve", str(folder), *limits]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}/{slide.name}"
            try:
                publish(lines_of(folder, url, given.rounds, given.latency_ms, given.mbit), given.out)
            finally:
                server.kill()


if __name__ == "__main__":
    main()

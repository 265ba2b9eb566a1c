"""Latency of the viewer while panning: the squares of a gigapixel slide and of its map.

The slide is the composed one of `bench.cpu.gigapixel`; its maps are random, with a value for every token of every tile,
so that no square of a map is empty. A view consists of the requests of a window of 1,280 × 800 px over six connections,
as in a browser; no square is requested twice. A square's time is from its request to its last byte, including the wait
for earlier squares.

    python -m bench.cpu.viewer_latency path/to/CMU-1-Small-Region.svs [--side 40000] [--views 12] [--keep DIR]

Writes bench/results/viewer_latency.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import psutil

from bench.cpu.gigapixel import composed, cpu_name
from bench.pages import publish
from maskattn.slide.layouts.tile_features import TileHeader
from maskattn.slide.prediction import ModelIdentity, SlideCounts, SlideFile, SlidePrediction
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.tables import relevance_table
from maskattn.viewer.answers import CHUNK, Answers
from maskattn.viewer.catalogue import read_catalogue
from maskattn.viewer.server import ViewerServer

RESULTS = Path(__file__).parents[1] / "results"
TILE_LV0, TOKENS, CLASSES = 256, 16, ("a", "b")
WINDOW, SQUARE_PX, CONNECTIONS = (1280, 800), 256, 6
LOOK_S = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("region", type=Path, help="CMU-1-Small-Region.svs")
    parser.add_argument("--side", type=int, default=40_000, help="approximate width and height in pixels")
    parser.add_argument("--views", type=int, default=12, help="number of views at each magnification")
    parser.add_argument("--keep", type=Path, help="folder for the slide and the outputs; by default they are removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        slide = composed(arguments.region, folder, arguments.side)
        with SlideReader(slide) as reader:
            write_outputs(folder / "out" / "composed", reader.info)
        publish(table(folder / "out", arguments.views), RESULTS / "viewer_latency.md")


def write_outputs(folder: Path, info: SlideInfo, tokens: bool = True) -> None:
    """Write outputs with random maps over the complete slide, of its tokens or only of its tiles."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows, columns = math.ceil(info.height_px / TILE_LV0), math.ceil(info.width_px / TILE_LV0)
    coords_T2 = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2) * TILE_LV0
    T = len(coords_T2)
    header = TileHeader(
        slide_id="composed",
        patch_size_px=TILE_LV0,
        patch_size_lv0=TILE_LV0,
        spacing_um=info.spacing_um,
        width_px=info.width_px,
        height_px=info.height_px,
        spacing_lv0_um=info.spacing_um,
    )
    relevance = rng.normal(size=(len(CLASSES), T)).astype(np.float32)
    path, hw = folder / "relevance.h5", (TOKENS, TOKENS) if tokens else None
    with relevance_table(path, CLASSES, relevance, rng.random(T), coords_T2, header, "random", hw) as write:
        for first in range(0, T if hw else 0, 1024):
            some = np.arange(first, min(first + 1024, T))
            values = rng.normal(size=(len(CLASSES), len(some), TOKENS, TOKENS)).astype(np.float32)
            write(some, values, np.abs(values[0]), np.ones((len(some), TOKENS, TOKENS), bool))
    size = info.path.stat().st_size
    file = SlideFile(
        str(info.path), size, info.vendor, info.width_px, info.height_px, info.spacing_um, "metadata", None
    )
    prediction = SlidePrediction(
        slide_id="composed",
        prediction="a",
        scores={"a": 0.6, "b": 0.4},
        logits={"a": 0.4, "b": 0.0},
        model=ModelIdentity("random", "0" * 16, CLASSES, True, ""),
        slide=file,
        tissue={"method": "none", "fraction": 1.0, "notes": []},
        settings={},
        counts=SlideCounts(T, T, T * TOKENS**2, 0, 0),
        timings_s={},
        versions={},
    )
    prediction.write(folder / "prediction.json")


def table(out: Path, views: int) -> Iterator[str]:
    """Serve the outputs, pan, and yield the table of times."""
    with serving(out) as (_, port):
        cold = whole_view(port, "slide, whole, asked for as it opens")
    with serving(out) as (answers, port):
        answers.open_first()
        time.sleep(LOOK_S)
        ahead = whole_view(port, f"slide, whole, {LOOK_S} s after the start of `maskattn view`")
        about = json.loads(fetch(port, "/api/slides/0")[1])
        start = time.perf_counter()
        fetch(port, "/api/slides/0/maps/0")
        first_map_s = time.perf_counter() - start
        yield "# Panning in the viewer"
        yield ""
        yield (
            f"{about['width']:,} × {about['height']:,} px, {TOKENS * TOKENS} tokens a tile, "
            f"{about['width'] * about['height'] * TOKENS**2 // TILE_LV0**2 / 1e6:.1f} million tokens. {cpu_name()}, "
            f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.0f} from other work when it began. "
            "`python -m bench.cpu.viewer_latency CMU-1-Small-Region.svs`"
        )
        yield ""
        yield f"The first look at a map reads it whole: {first_map_s:.2f} s. Milliseconds for a square:"
        yield ""
        yield "| what | squares | median | 95 % | longest | processor time |"
        yield "|---|---|---|---|---|---|"
        yield cold
        yield ahead
        rng = np.random.default_rng(1)
        finest = about["levels"] - 1
        for shrink in (0, 1, 2, 3, 4, 5):
            paths = [squares_of_view(about, finest - shrink, shrink, rng) for _ in range(views)]
            yield row(port, f"slide, {2**shrink} px of level 0 a pixel", paths)
        side = math.ceil(about["width"] / (TILE_LV0 / TOKENS) / CHUNK)
        paths = [[f"/api/slides/0/maps/0/0/{column}_{row}.f32" for column in range(side)] for row in range(side)]
        yield row(port, f"map, {CHUNK} × {CHUNK} tokens", paths[:views])


@contextmanager
def serving(out: Path) -> Iterator[tuple[Answers, int]]:
    """Serve a viewer of the outputs; yield its answers and its port."""
    answers = Answers(read_catalogue(out))
    with ViewerServer(answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield answers, server.server_port
        server.shutdown()


def whole_view(port: int, name: str) -> str:
    """Open the slide, and request all squares of the magnification at which it fits into the window."""
    about = json.loads(fetch(port, "/api/slides/0")[1])
    sides = about["width"], about["height"]
    shrink = max(math.ceil(math.log2(size / window)) for size, window in zip(sides, WINDOW, strict=True))
    columns, rows = (range(math.ceil(size / 2**shrink / SQUARE_PX)) for size in sides)
    level = about["levels"] - 1 - shrink
    squares = [f"/api/slides/0/squares/{level}/{column}_{row}.jpg" for row in rows for column in columns]
    return row(port, name, [squares])


def squares_of_view(about: dict[str, int], level: int, shrink: int, rng: np.random.Generator) -> list[str]:
    """Return the requests of a window at a random position."""
    ranges = [
        range(first, min(first + math.ceil(window / SQUARE_PX) + 1, math.ceil(size / 2**shrink / SQUARE_PX)))
        for size, window in zip((about["width"], about["height"]), WINDOW, strict=True)
        for first in [
            int(rng.integers(max(1, math.ceil(size / 2**shrink / SQUARE_PX) - math.ceil(window / SQUARE_PX))))
        ]
    ]
    return [f"/api/slides/0/squares/{level}/{column}_{row}.jpg" for row in ranges[1] for column in ranges[0]]


def row(port: int, name: str, views: list[list[str]]) -> str:
    """Request view after view over a browser's number of connections; return the row of the table."""
    seen: set[str] = set()
    took: list[float] = []
    before = processor_s()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for view in views:
            fresh = [path for path in view if path not in seen]
            seen |= set(fresh)
            took += [seconds for seconds, _ in pool.map(lambda path: fetch(port, path), fresh)]
    each_ms = (processor_s() - before) / len(took) * 1e3
    figures = [statistics.median(took), float(np.quantile(took, 0.95)), max(took)]
    return f"| {name} | {len(took)} | {' | '.join(f'{1e3 * value:.0f}' for value in figures)} | {each_ms:.1f} |"


def processor_s(without: str = "-") -> float:
    """Return the processor time of this process and its children, except children whose name contains ``without``."""
    children = psutil.Process().children(recursive=True)
    family = [psutil.Process(), *(child for child in children if without not in child.name())]
    return sum(sum(member.cpu_times()[:2]) for member in family)


_local = threading.local()


def fetch(port: int, path: str) -> tuple[float, bytes]:
    """Send one request over the thread's own connection; return its seconds and body."""
    if getattr(_local, "port", None) != port:
        _local.connection, _local.port = HTTPConnection("127.0.0.1", port), port
    start = time.perf_counter()
    _local.connection.request("GET", path)
    answer = _local.connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body
    return time.perf_counter() - start, body


if __name__ == "__main__":
    main()

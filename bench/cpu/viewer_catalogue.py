"""Latency of the viewer with a hundred slides: loading, sorting and searching its table, and opening the next slide.

Every slide of the run is the composed one of `bench.cpu.gigapixel` under its own id, with random maps of tiles. The
page is opened in headless Chromium. The time of a step is measured in the page, from the event to the end of the layout
that follows; that of the next slide is from the key press to the last square of its first view.

    python -m bench.cpu.viewer_catalogue path/to/CMU-1-Small-Region.svs [--side 40000] [--slides 100] [--keep DIR]

needs playwright and Chromium. Writes bench/results/viewer_catalogue.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from bench.cpu.gigapixel import compose, cpu_name
from bench.cpu.viewer_latency import fetch, processor_s, write_outputs
from bench.pages import publish
from maskattn.slide.prediction import read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.viewer.answers import Answers
from maskattn.viewer.catalogue import read_catalogue
from maskattn.viewer.server import ViewerServer

RESULTS = Path(__file__).parents[1] / "results"
STEPS = 8
_LOADED = """() => document.querySelector(".square img") && document.querySelector("canvas.map-square")
  && !document.querySelector(".leaflet-tile:not(.leaflet-tile-loaded)")"""
_TIMED = """([selector, type, value]) => {
  const element = document.querySelector(selector), start = performance.now();
  if (type === "click") element.click();
  else { element.value = value; element.dispatchEvent(new Event(type)); }
  document.body.getBoundingClientRect();
  return performance.now() - start;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("region", type=Path, help="CMU-1-Small-Region.svs")
    parser.add_argument("--side", type=int, default=40_000, help="approximate width and height in pixels")
    parser.add_argument("--slides", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="folder for the slide and the outputs; by default they are removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        slide = folder / f"composed_{arguments.side}.tiff"
        if not slide.exists():
            compose(arguments.region, slide, arguments.side)
        write_run(folder / "hundred", slide, arguments.slides)
        publish(page(folder / "hundred"), RESULTS / "viewer_catalogue.md")


def write_run(out: Path, slide: Path, slides: int) -> None:
    """Write outputs of one slide under many ids, each with random scores."""
    shutil.rmtree(out, ignore_errors=True)
    rng = np.random.default_rng(0)
    rows = []
    with SlideReader(slide) as reader:
        write_outputs(out / "slide_000", reader.info, tokens=False)
    first = read_prediction(out / "slide_000" / "prediction.json")
    for index in range(slides):
        folder, score = out / f"slide_{index:03d}", float(rng.random())
        if index:
            folder.mkdir()
            shutil.copy(out / "slide_000" / "relevance.h5", folder)
        scores = {"a": score, "b": 1 - score}
        prediction = max(scores, key=scores.__getitem__)
        one = replace(first, slide_id=folder.name, scores=scores, prediction=prediction)
        one.write(folder / "prediction.json")
        row = {"slide_id": folder.name, "status": "ok", "reason": "", "seconds": f"{100 * rng.random():.2f}"}
        rows.append(row | {"prediction": prediction, **{f"score_{name}": f"{scores[name]:.6f}" for name in scores}})
    with (out / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def page(out: Path) -> Iterator[str]:
    """Open the page, sort, search and go to the next slides; yield the table of times."""
    start, before = time.perf_counter(), time.process_time()
    catalogue = read_catalogue(out)
    read_s, read_cpu_s = time.perf_counter() - start, time.process_time() - before
    answers = Answers(catalogue)
    with ViewerServer(answers) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers.open_first()
        listed_s, body = fetch(server.server_port, "/api/run")
        browser = open_browser(playwright)
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        start = time.perf_counter()
        tab.goto(server.url)
        tab.wait_for_selector("#table tbody tr")
        table_s = time.perf_counter() - start
        tab.wait_for_function(_LOADED)
        shown_s = time.perf_counter() - start
        columns = tab.locator("#table th").count()
        sorts = [timed(tab, f"#table th:nth-child({k}) button", "click") for k in range(1, columns + 1) for _ in (1, 2)]
        searches = [timed(tab, "#filter", "input", text) for text in ("s", "sl", "slide_04", "0.9", "")]
        nexts, each = next_slides(tab)
        browser.close()
        yield "# A hundred slides in the viewer"
        yield ""
        yield (
            f"{len(catalogue.entries)} slides of {catalogue.entries[0].row['tiles']} tiles, {columns} columns. "
            f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.0f}, with headless "
            "Chromium. `python -m bench.cpu.viewer_catalogue CMU-1-Small-Region.svs`"
        )
        yield ""
        yield "| what | time |"
        yield "|---|---|"
        yield f"| the folder is read, once, at the start | {read_s:.2f} s ({read_cpu_s:.2f} s of processor time) |"
        yield f"| the table is sent, {len(body) / 1e3:.0f} kB | {1e3 * listed_s:.0f} ms |"
        yield f"| from the address to the table, drawn | {1e3 * table_s:.0f} ms |"
        yield f"| from the address to the slide and its map, drawn | {1e3 * shown_s:.0f} ms |"
        for what, took in (("sorted by a column", sorts), ("searched", searches)):
            middle, longest = statistics.median(took), max(took)
            yield f"| {what}, median of {len(took)}; longest | {middle:.1f} ms; {longest:.1f} ms |"
        yield (
            f"| from the key `n` to the next slide and its map, drawn, median of {STEPS}; longest | "
            f"{1e3 * statistics.median(nexts):.0f} ms; {1e3 * max(nexts):.0f} ms |"
        )
        yield f"| the server's processor time for that | {1e3 * each:.0f} ms |"


def next_slides(tab: Any) -> tuple[list[float], float]:
    """Measure the seconds from key press to drawn slide of several steps, and the server's processor time per step."""
    took = []
    tab.locator("#map").focus()
    tab.wait_for_timeout(4000)
    before = processor_s(without="chrom")
    for _ in range(STEPS):
        shown = tab.locator("#slide-name").text_content()
        start = time.perf_counter()
        tab.keyboard.press("n")
        tab.wait_for_function("shown => document.getElementById('slide-name').textContent !== shown", arg=shown)
        tab.wait_for_function("() => document.title.startsWith(document.getElementById('slide-name').textContent)")
        tab.wait_for_function(_LOADED)
        took.append(time.perf_counter() - start)
        tab.wait_for_timeout(4000)  # as if somebody looked at it
    return took, (processor_s(without="chrom") - before) / STEPS


def timed(tab: Any, selector: str, event: str, value: str = "") -> float:
    milliseconds: float = tab.evaluate(_TIMED, [selector, event, value])
    return milliseconds


def open_browser(playwright: Any) -> Any:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    # Chromium has no sandbox for root.
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])


if __name__ == "__main__":
    main()

"""Processor time, size on disk and peak memory of every output of `maskattn infer --tokens` on a composed slide.

The slide is that of `bench.cpu.gigapixel`. One run makes all outputs; the processor time of an output is the time spent
in its sink, and memory is sampled over all processes of the run. The report is made separately afterwards.

    python -m bench.cpu.gigapixel_outputs path/to/CMU-1-Small-Region.svs [--side 40000] [--keep DIR]

needs psutil, tifffile, imagecodecs and zarr. Writes bench/results/gigapixel_outputs.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import torch

from bench.cpu.gigapixel import compose, cpu_name, resident_bytes
from bench.pages import publish
from maskattn.cli.slide_runs import BUNDLED, Chosen, load_model
from maskattn.slide import tile_loop
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import SlidePrediction
from maskattn.slide.report import write_report
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.sinks import SINKS, ExplainedSlide, ExplainedTiles, Sink
from maskattn.slide.sinks.sink import Take

RESULTS = Path(__file__).parents[1] / "results"


class TimedSink:
    """A sink that measures the processor time spent in it."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.files = sink.files
        self.is_asked_for = sink.is_asked_for
        self.needs_no_slide = getattr(sink, "needs_no_slide", False)
        self.seconds = 0.0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - start

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[Take]:
        """Open the sink and measure what each call takes."""
        context: AbstractContextManager[Take] = self.sink.open(folder, slide)
        with self._timed():
            take = context.__enter__()

        def timed(tiles: ExplainedTiles) -> None:
            with self._timed():
                take(tiles)

        yield timed
        with self._timed():
            context.__exit__(None, None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("region", type=Path, help="CMU-1-Small-Region.svs")
    parser.add_argument("--side", type=int, default=40_000, help="approximate width and height in pixels")
    parser.add_argument("--keep", type=Path, help="folder for the slide and the outputs; by default they are removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        slide = folder / f"composed_{arguments.side}.tiff"
        if not slide.exists():
            compose(arguments.region, slide, arguments.side)
        publish(page(slide, folder / "outputs"), RESULTS / "gigapixel_outputs.md")


def page(slide: Path, out: Path) -> Iterator[str]:
    """Run the slide, then report on it."""
    model = load_model(Chosen(model=BUNDLED), None, "cpu")
    settings = RunSettings(
        out,
        tokens=True,
        geojson="tokens",
        regions=(f"{model.config.classes[0]}=95%",),
        ome_tiff="both",
        zarr=True,
        overwrite=True,
    )
    timed = tuple(TimedSink(sink) for sink in SINKS)
    tile_loop.SINKS = timed
    with peak_memory() as of_run:
        (outcome,) = run_slides([SlideJob(slide.stem, slide)], model, settings)
    if outcome.prediction is None:
        raise SystemExit(outcome.reason)
    start = time.process_time()
    with peak_memory() as of_report:
        written = write_report(out)
    report_s = time.process_time() - start
    yield from table(outcome.prediction, outcome.seconds, timed, out / slide.stem, of_run[0])
    yield (
        f"| `maskattn report`, by itself | {report_s:.1f} | {written.stat().st_size / 1e6:.1f} | {of_report[0]:,.0f} |"
    )


def table(
    prediction: SlidePrediction, seconds: float, timed: tuple[TimedSink, ...], folder: Path, peak_mib: float
) -> Iterator[str]:
    """Yield the table with the costs of each output."""
    counts, slide = prediction.counts, prediction.slide
    yield "# Every output of a composed slide"
    yield ""
    yield (
        f"{slide.width_px:,} × {slide.height_px:,} px, {counts.kept_tokens:,} tokens in {counts.kept_tiles:,} tiles, "
        f"{len(prediction.scores)} classes and attention; model {prediction.model.name} ({prediction.model.sha256}). "
        f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.0f}, "
        f"{torch.get_num_threads()} torch threads. "
        f"`python -m bench.cpu.gigapixel_outputs CMU-1-Small-Region.svs --side {max(slide.width_px, slide.height_px)}`"
    )
    yield ""
    yield "| output | processor time, s | MB | peak memory of all processes, MiB |"
    yield "|---|---|---|---|"
    for one in timed:
        files = [path for pattern in one.files for path in folder.glob(pattern)]
        size = sum(path.stat().st_size for file in files for path in (file.rglob("*") if file.is_dir() else [file]))
        yield f"| {', '.join(f'`{pattern}`' for pattern in one.files)} | {one.seconds:.1f} | {size / 1e6:.1f} | |"
    busy = sum(psutil.Process().cpu_times()[:4])  # with the children that have ended
    yield f"| the whole run, {seconds:.0f} s on the clock | {busy:.1f} | | {peak_mib:,.0f} |"


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure the peak resident memory of this process and its children; the list gets the MiB at the end."""
    peak, done, found = [0], threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], resident_bytes(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found[0] = peak[0] / 2**20


if __name__ == "__main__":
    main()

"""Decoding in a separate process gives the same pixels, and a crash or a hang harms nothing but its slide."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slides import DrawnSlide, make_slide
from small_slides import small_model, write_slide

from maskattn.errors import ReadingStopped, SlideError
from maskattn.slide.formats import decoding_process, isolated_image
from maskattn.slide.formats.decoding_process import DecodingProcess
from maskattn.slide.grid import make_grid
from maskattn.slide.manifest import SlideJob
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.reader import SlideReader
from maskattn.slide.run import run_slides
from maskattn.slide.stream import stream_tiles


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> DrawnSlide:
    return make_slide(tmp_path_factory.mktemp("slides") / "drawn.tif", 700, 500, downsamples=(4,))


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DecodingProcess]]:
    """The decoding processes that the test starts, in order."""
    started: list[DecodingProcess] = []

    def start(answers_within_s: float) -> DecodingProcess:
        started.append(DecodingProcess(answers_within_s))
        return started[-1]

    monkeypatch.setattr(isolated_image, "DecodingProcess", start)
    monkeypatch.setattr(isolated_image, "_idle", [])
    yield started
    for one in started:
        one.end()


def pid_of(process: DecodingProcess) -> int:
    return process._process.pid


def test_a_process_that_was_started_ahead_is_the_one_that_decodes(
    slide: DrawnSlide, process: list[DecodingProcess]
) -> None:
    isolated_image.start_ahead()
    isolated_image.start_ahead()  # one is enough
    assert len(process) == 1
    with SlideReader(slide.path, isolated=True) as reader:
        reader.read_region(0, 0, (10, 10), (10, 10))
    assert len(process) == 1


def test_an_isolated_reader_sees_what_a_plain_one_sees(slide: DrawnSlide) -> None:
    with SlideReader(slide.path) as plain, SlideReader(slide.path, isolated=True) as isolated:
        assert isolated.info == plain.info
        assert isolated.describe() == plain.describe()
        for place in ((0, 0, (700, 500), (700, 500)), (-20, 450, (300, 300), (75, 75)), (600, 0, (64, 64), (32, 32))):
            np.testing.assert_array_equal(isolated.read_region(*place), plain.read_region(*place))
        copy = pickle.loads(pickle.dumps(isolated))
        np.testing.assert_array_equal(copy.thumbnail(100), plain.thumbnail(100))


def test_a_relative_path_starts_at_the_working_directory_of_this_process(slide: DrawnSlide, monkeypatch) -> None:
    with SlideReader(slide.path, isolated=True) as first:  # starts the server of decoding processes, if none is yet
        expected = first.info
    monkeypatch.chdir(slide.path.parent)
    with SlideReader(Path(slide.path.name), isolated=True) as reader:
        assert reader.info.width_px == expected.width_px


def test_pixels_that_do_not_fit_into_shared_memory_still_arrive(
    slide: DrawnSlide, process: list[DecodingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bytes_ in (1000, None):
        with monkeypatch.context() as patch:
            if bytes_ is None:
                patch.delattr(os, "memfd_create")
            else:
                patch.setattr(decoding_process, "_SHARED_BYTES", bytes_)
                patch.setattr(
                    decoding_process,
                    "_SERVE",
                    f"import sys; sys.path[:] = {{path!r}}; import {{module}} as m; "
                    f"m._SHARED_BYTES = {bytes_}; m.serve({{handle}}, {{shared}})",
                )
            with SlideReader(slide.path, isolated=True) as reader:
                np.testing.assert_array_equal(reader.read_region(0, 0, (700, 500), (700, 500)), slide.rgb_HW3)
        isolated_image._idle.clear()
    assert len(process) == 2


def test_a_file_that_cannot_be_opened_gives_the_same_message(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    for path in (tmp_path / "text.svs", tmp_path / "gone.svs", tmp_path):
        said = []
        for isolated in (False, True):
            with pytest.raises(SlideError) as caught:
                SlideReader(path, isolated=isolated)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_a_process_serves_one_slide_after_another(slide: DrawnSlide, process: list[DecodingProcess]) -> None:
    for _ in range(3):
        with SlideReader(slide.path, isolated=True) as reader:
            reader.thumbnail(50)
    assert len(process) == 1
    os.kill(pid_of(process[0]), signal.SIGKILL)
    time.sleep(0.2)
    with SlideReader(slide.path, isolated=True) as reader:
        reader.thumbnail(50)
    assert len(process) == 2


def test_a_process_that_was_ended_while_it_waited_is_started_again(
    slide: DrawnSlide, process: list[DecodingProcess]
) -> None:
    with SlideReader(slide.path, isolated=True) as reader:
        os.kill(pid_of(process[0]), signal.SIGKILL)
        time.sleep(0.2)
        region = reader.read_region(0, 0, (256, 256), (256, 256))
        np.testing.assert_array_equal(region, slide.rgb_HW3[:256, :256])
    assert len(process) == 2


def test_a_decoder_that_crashes_again_and_again_stops_its_slide(
    slide: DrawnSlide, process: list[DecodingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = DecodingProcess.ask

    def deadly(self: DecodingProcess, request: str, *arguments: object) -> object:
        if request == "read":
            os.kill(pid_of(self), signal.SIGSEGV)
        return ask(self, request, *arguments)

    monkeypatch.setattr(DecodingProcess, "ask", deadly)
    reader = SlideReader(slide.path, isolated=True)
    grid = make_grid(reader.info, None, tile_px=64, token_px=16, spacing_um=0.5, masked=False)
    with pytest.raises(ReadingStopped, match=r"must not crash its decoder.*16 times.*SIGSEGV"):
        list(stream_tiles(reader, grid, batch_size=8))
    for _ in range(2):
        with pytest.raises(ReadingStopped, match="16 times"):
            reader.read_region(0, 0, (64, 64), (64, 64))
    assert len(process) == 16


def test_a_decoder_that_hangs_stops_its_slide_in_bounded_time_and_the_next_one_runs(
    process: list[DecodingProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = write_slide(tmp_path / "disc.tiff")
    monkeypatch.setattr(isolated_image, "_ANSWERS_WITHIN_S", 5.0)
    ask = DecodingProcess.ask
    hung: list[int] = []

    def hanging(self: DecodingProcess, request: str, *arguments: object) -> object:
        if request == "read" and not hung:
            hung.append(pid_of(self))
            os.kill(pid_of(self), signal.SIGSTOP)
        return ask(self, request, *arguments)

    monkeypatch.setattr(DecodingProcess, "ask", hanging)
    jobs = [SlideJob("hangs", slide), SlideJob("runs", slide)]
    start = time.monotonic()
    outcomes = run_slides(jobs, small_model(), RunSettings(tmp_path / "out", batch_size=8))
    assert [outcome.status for outcome in outcomes] == ["failed", "ok"], outcomes[1].reason
    assert "must answer within 5 s" in outcomes[0].reason
    assert time.monotonic() - start < 60
    assert not Path(f"/proc/{hung[0]}").exists()


def test_no_decoding_process_outlives_its_owner(slide: DrawnSlide) -> None:
    script = f"""
import os, sys
from maskattn.slide.formats import decoding_process, isolated_image
from maskattn.slide.reader import SlideReader
reader = SlideReader({str(slide.path)!r}, isolated=True)
pid = reader._image._process._process.pid
print(pid, flush=True)
os.kill(os.getpid(), {int(signal.SIGKILL)}) if sys.argv[1] != "ends" else None
"""
    for how, code in (("ends", 0), ("is killed", -9)):
        done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (code, "")
        deadline = time.monotonic() + 10
        while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{done.stdout.strip()}").exists()

"""Decoding workers that cannot start, die or hang: the run continues without them, or the slide fails with a reason."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from slides import make_slide
from small_slides import small_model

from maskattn.errors import SlideError
from maskattn.slide import workers
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.manifest import SlideJob
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.reader import SlideReader
from maskattn.slide.run import run_slides
from maskattn.slide.stream import stream_tiles


class Deadly(SlideReader):
    """A reader that kills its worker."""

    def read_region(self, *arguments: object, **options: object) -> np.ndarray:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read_region(*arguments, **options)


class Hanging(SlideReader):
    """A reader that never returns, in a worker."""

    def read_region(self, *arguments: object, **options: object) -> np.ndarray:
        time.sleep(3600)
        return super().read_region(*arguments, **options)


class Slow(SlideReader):
    """A reader that is slow for every tile."""

    def read_region(self, *arguments: object, **options: object) -> np.ndarray:
        time.sleep(0.4)
        return super().read_region(*arguments, **options)


class Faulty(SlideReader):
    """A reader with a bug."""

    def read_region(self, *arguments: object, **options: object) -> np.ndarray:
        raise KeyError("a bug")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slide(tmp_path_factory.mktemp("slides") / "drawn.tif", 512, 512, downsamples=()).path


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LOOK_EVERY_S", 0.5)


def whole_grid(path: Path) -> TokenGrid:
    with SlideReader(path) as reader:
        return make_grid(reader.info, None, tile_px=128, token_px=32, spacing_um=0.5, masked=False)


def test_a_worker_that_is_killed_fails_the_slide_with_what_to_do(path: Path) -> None:
    with pytest.raises(SlideError, match=r"worker must live.*killed.*--workers 0"):
        list(stream_tiles(Deadly(path), whole_grid(path), batch_size=4, workers=2))


def test_a_worker_that_hangs_fails_the_slide_in_bounded_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_STALLED_AFTER_S", 3.0)
    start = time.monotonic()
    with pytest.raises(SlideError, match=r"must decode within 3 s.*check the drive"):
        list(stream_tiles(Hanging(path), whole_grid(path), batch_size=4, workers=1))
    assert time.monotonic() - start < 60


def test_a_batch_that_takes_longer_than_one_poll_still_arrives(path: Path) -> None:
    batches = list(stream_tiles(Slow(path), whole_grid(path), batch_size=8, workers=1))  # 3.2 s a batch
    assert [batch.rows_B.tolist() for batch in batches] == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("alive", [True, False])
def test_slow_workers_are_told_from_hung_ones_by_the_tiles_that_arrive(
    alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_STALLED_AFTER_S", 1.0)
    heartbeat = workers.Heartbeat()

    class Waiting:
        """A loader's iterator that finds no batch for two seconds."""

        looks = 0

        def __iter__(self) -> Waiting:
            return self

        def __next__(self) -> str:
            if self.looks == 10:
                raise StopIteration
            time.sleep(0.2)
            self.looks += 1
            if alive:
                heartbeat.beat()
            if self.looks < 10:
                raise RuntimeError("DataLoader timed out after 0.2 seconds")
            return "batch"

    if alive:
        assert list(workers.watched(Waiting(), heartbeat, Path("s.tif"))) == ["batch"]
    else:
        with pytest.raises(SlideError, match="must decode within 1 s"):
            list(workers.watched(Waiting(), heartbeat, Path("s.tif")))


def test_a_bug_in_a_worker_is_not_taken_for_a_dead_one(path: Path) -> None:
    with pytest.raises(KeyError, match="a bug"):
        list(stream_tiles(Faulty(path), whole_grid(path), batch_size=4, workers=1))


def test_without_processes_the_stream_decodes_by_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.ForkServerContext.Queue", refuse)
    with caplog.at_level(logging.WARNING, "maskattn"):
        batches = list(stream_tiles(SlideReader(path), whole_grid(path), batch_size=4, workers=2))
    assert torch.cat([batch.rows_B for batch in batches]).tolist() == list(range(16))
    assert "continues without worker processes" in caplog.text
    assert "Resource temporarily unavailable" in caplog.text


NO_ROOM = """
import logging, resource, sys
sys.path[:0] = {path!r}
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # shared memory is files: a batch of 4 has 196,608 bytes
from test_workers import Path, SlideReader, stream_tiles, whole_grid
path = Path(sys.argv[1])
for workers in (0, 2):
    batches = list(stream_tiles(SlideReader(path), whole_grid(path), batch_size=4, workers=workers))
    print([batch.rows_B.tolist() for batch in batches], sum(int(batch.tiles_BCHW.sum()) for batch in batches))
"""


def test_without_room_in_shared_memory_the_stream_goes_on_from_the_same_tile(path: Path) -> None:
    script = NO_ROOM.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    without, with_workers = done.stdout.splitlines()
    assert without == with_workers
    assert "[12, 13, 14, 15]" in without
    (warning,) = done.stderr.splitlines()
    assert "continues without worker processes" in warning
    assert "--shm-size" in warning


def test_a_slide_whose_worker_dies_leaves_the_others_unharmed(path: Path, tmp_path: Path) -> None:
    model, out = small_model(), tmp_path / "out"
    settings = RunSettings(out, batch_size=4, workers=1, masked=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskattn.slide.opened_ahead.SlideReader", Deadly)
        (failed,) = run_slides([SlideJob("deadly", path)], model, settings)
    (ok,) = run_slides([SlideJob("fine", path)], model, settings)
    assert (failed.status, ok.status) == ("failed", "ok"), ok.reason
    assert "a decoding worker must live" in failed.reason
    assert {entry.name for entry in out.iterdir()} == {"fine", "summary.csv"}

"""A run of three slides, one of them broken and one of an evil name, and a viewer that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import EVIL, serving
from small_slides import small_model, write_slide

from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.viewer.server import ViewerServer


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("viewed")
    slide = write_slide(folder / "disc.tiff")
    broken = folder / "broken.tiff"
    broken.write_bytes(b"no slide")
    jobs = [SlideJob("plain", slide), SlideJob(EVIL, slide), SlideJob("broken", broken)]
    run_slides(jobs, small_model(), RunSettings(folder / "out", tokens=True, batch_size=8))
    return folder / "out"


@pytest.fixture(scope="module")
def viewer(out: Path) -> Iterator[ViewerServer]:
    with serving(out) as server:
        yield server

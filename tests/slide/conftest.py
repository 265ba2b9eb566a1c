"""Fixtures of the tests of complete runs: a small model, a small slide, and settings for a temporary folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from slides import DrawnSlide, make_slide
from small_slides import small_model, write_slide

from maskattn.nn.slide_model import SlideModel
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.request import RunSettings


@pytest.fixture(scope="module")
def model() -> SlideModel:
    return small_model()


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tiff")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DrawnSlide:
    return make_slide(tmp_path_factory.mktemp("slides") / "drawn.tif", 2048, 1536, spacing_um=1.0)


@pytest.fixture(scope="module")
def drawn_info(drawn: DrawnSlide) -> SlideInfo:
    return SlideReader(drawn.path).info


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return RunSettings(tmp_path / "out", batch_size=8)

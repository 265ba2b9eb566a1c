"""The pyramid's geometry is Deep Zoom's, and its squares show what OpenSlide's generator shows."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from maskattn.slide.manifest import SlideJob
from maskattn.viewer.catalogue import Entry
from maskattn.viewer.opened_slide import OpenedSlide
from maskattn.viewer.pyramid import TILE_PX, Pyramid


@pytest.fixture(params=[(1, 1), (2, 1), (256, 257), (4096, 1), (5000, 3001), (100_001, 77_777)], ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def slide_of_size(size: tuple[int, int]) -> Any:
    """As much of a slide as OpenSlide's generator asks for before it reads pixels."""
    return SimpleNamespace(
        properties={},
        level_count=1,
        level_dimensions=(size,),
        level_downsamples=(1.0,),
        get_best_level_for_downsample=lambda downsample: 0,
    )


def test_levels_and_squares_are_those_of_openslides_generator(size: tuple[int, int]) -> None:
    generator = DeepZoomGenerator(slide_of_size(size), tile_size=TILE_PX, overlap=0)
    pyramid = Pyramid(*size)
    assert pyramid.levels == generator.level_count
    for level in range(pyramid.levels):
        assert pyramid.size_of(level) == generator.level_dimensions[level]
        columns, rows = generator.level_tiles[level]
        square = pyramid.square(level, columns - 1, rows - 1)
        assert (square.width_px, square.height_px) == generator.get_tile_dimensions(level, (columns - 1, rows - 1))
        for beyond in ((columns, 0), (0, rows), (-1, 0)):
            with pytest.raises(IndexError):
                pyramid.square(level, *beyond)
    with pytest.raises(IndexError):
        pyramid.square(pyramid.levels, 0, 0)


def test_squares_show_the_pixels_that_openslides_generator_shows(out: Path) -> None:
    path = out.parent / "disc.tiff"
    opened = OpenedSlide(Entry("disc", {}, job=SlideJob("disc", path)), None)
    with openslide.OpenSlide(path) as slide:
        generator = DeepZoomGenerator(slide, tile_size=TILE_PX, overlap=0)
        for level in range(generator.level_count):
            for place in {(0, 0), tuple(count - 1 for count in generator.level_tiles[level])}:
                expected = np.asarray(generator.get_tile(level, place).convert("RGB")).astype(float)
                found = np.asarray(Image.open(io.BytesIO(opened.square(level, *place))).convert("RGB")).astype(float)
                # Its last step of reduction keeps proportions, and may lose a pixel of a side.
                rows, columns = (min(pair) for pair in zip(found.shape[:2], expected.shape[:2], strict=True))
                assert max(abs(np.subtract(found.shape, expected.shape))) <= 1
                found, expected = found[:rows, :columns], expected[:rows, :columns]
                if min(rows, columns) < 32:
                    continue  # of a few pixels JPEG keeps the brightness alone
                # JPEG and another filter of reduction; a square in the wrong place would differ by the stain.
                assert np.abs(found - expected).mean() < 8
    opened.close()

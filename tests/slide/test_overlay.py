from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from maskattn.slide.canvas import MapCanvas
from maskattn.slide.colours import COLOUR_MAPS, colour_limit, colour_limit_of_counted, coloured, strengths_of
from maskattn.slide.legends import round_length
from maskattn.slide.outlines.writing import PALETTE
from maskattn.slide.overlay import (
    begin_heatmap,
    blend,
    smoothed,
    write_heatmap,
    write_mask_overlay,
)
from maskattn.slide.tissue import TissueMask


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def thumbnail() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(300, 500, 3), dtype=np.uint8)


@pytest.fixture
def values() -> np.ndarray:
    values = np.full((300, 500), np.nan, dtype=np.float32)
    values[100:200, 50:300] = np.random.default_rng(1).normal(size=(100, 250))
    return values


def test_canvas_gives_each_pixel_the_token_at_its_centre() -> None:
    rng = np.random.default_rng(0)
    slide_px, thumbnail_px, tile_lv0, tokens = (1000, 900), (333, 300), 257, 4
    coords = np.array([(x, y) for y in range(0, 1000, tile_lv0) for x in range(0, 900, tile_lv0)])
    values = rng.normal(size=(2, len(coords), tokens, tokens)).astype(np.float32)
    keep = rng.random((len(coords), tokens, tokens)) < 0.5
    canvas = MapCanvas(2, thumbnail_px, slide_px, tile_lv0)
    canvas.paint(coords[:7], values[:, :7], keep[:7])
    canvas.paint(coords[7:], values[:, 7:], keep[7:])
    for row, column in rng.integers(0, 300, size=(200, 2)):
        y, x = (row + 0.5) * slide_px[0] / thumbnail_px[0], (column + 0.5) * slide_px[1] / thumbnail_px[1]
        (tile,) = np.flatnonzero((coords == (x // tile_lv0 * tile_lv0, y // tile_lv0 * tile_lv0)).all(axis=1))
        token = int(y % tile_lv0 * tokens / tile_lv0), int(x % tile_lv0 * tokens / tile_lv0)
        place = (tile, *token)
        expected = values[(slice(None), *place)] if keep[place] else [np.nan, np.nan]
        np.testing.assert_array_equal(canvas.values_of_pixels()[:, row, column], expected)


@pytest.mark.parametrize("kind", ["diverging", "sequential"])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_a_map_from_the_canvas_is_drawn_as_its_pixels_are(tmp_path: Path, kind: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    slide_px, thumbnail_px, tile_lv0 = (1000, 900), (333, 300), 120
    coords = np.array([(x, y) for y in range(-60, 1000, 90) for x in range(-60, 900, 90)])  # they overlap
    values = rng.normal(size=(2, len(coords), tokens, tokens)).astype(np.float32)
    keep = rng.random((len(coords), max(tokens, 2), max(tokens, 2))) < 0.8
    canvas = MapCanvas(2, thumbnail_px, slide_px, tile_lv0)
    canvas.paint(coords[:70], values[:, :70], keep[:70])
    canvas.paint(coords[70:], values[:, 70:], keep[70:])
    thumbnail = rng.integers(0, 256, (*thumbnail_px, 3), dtype=np.uint8)
    for painted, pixels in zip(canvas.maps(), canvas.values_of_pixels(), strict=True):
        assert 0.05 < np.isnan(pixels).mean() < 0.5
        np.testing.assert_array_equal(painted.of_pixels(painted.values_V), pixels)
        limits = colour_limit_of_counted(painted.values_V, painted.pixels_V, kind)
        assert limits == colour_limit(pixels, kind)
        write_heatmap(tmp_path / "pixels.png", thumbnail, pixels, "t", "l", kind)
        begin_heatmap(tmp_path / "painted.png", thumbnail, painted, "t", "l", kind)()
        assert (tmp_path / "painted.png").read_bytes() == (tmp_path / "pixels.png").read_bytes()


@pytest.mark.parametrize("kind", ["diverging", "sequential"])
def test_limits_of_counted_values_are_those_of_the_values_repeated(kind: str) -> None:
    rng = np.random.default_rng(0)
    for number in (1, 2, 3, 10, 700):
        for most in (1, 2, 900):
            values = rng.normal(size=number).astype(np.float32).round(1)
            values[rng.random(number) < 0.1] = np.nan
            counts = rng.integers(0, most + 1, number)
            expected = colour_limit(values.repeat(counts), kind)
            assert colour_limit_of_counted(values, counts, kind) == expected, (number, most)


def test_no_more_tokens_are_kept_than_there_are_pixels() -> None:
    canvas = MapCanvas(1, (50, 50), (50_000, 50_000), 10_000)
    coords = np.array([(x, y) for y in range(0, 50_000, 10_000) for x in range(0, 50_000, 10_000)])
    canvas.paint(coords, np.ones((1, 25, 200, 200), np.float32), np.ones((25, 200, 200), bool))
    (painted,) = canvas.maps()
    assert len(painted.values_V) == 1 + 50 * 50
    assert painted.pixels_V.sum() == 50 * 50


def test_tile_values_are_painted_on_kept_tokens_only() -> None:
    canvas = MapCanvas(1, (64, 64), (64, 64), 64)
    keep = np.zeros((1, 2, 2), dtype=bool)
    keep[0, 0, 1] = True
    canvas.paint(np.array([[0, 0]]), np.full((1, 1, 1, 1), 3.0), keep)
    assert np.isfinite(canvas.values_of_pixels()).sum() == 32 * 32
    assert (canvas.values_of_pixels()[0, :32, 32:] == 3.0).all()


def test_tile_beyond_the_edge_is_cut() -> None:
    canvas = MapCanvas(1, (50, 70), (50, 70), 64)
    canvas.paint(np.array([[64, 0]]), np.ones((1, 1, 1, 1)), np.ones((1, 4, 4), dtype=bool))
    assert np.isfinite(canvas.values_of_pixels()[0]).nonzero()[1].min() == 64


@pytest.mark.parametrize("kind", ["diverging", "sequential"])
def test_background_is_untouched_bit_for_bit(thumbnail: np.ndarray, values: np.ndarray, kind: str) -> None:
    image = blend(thumbnail, values, kind)
    changed = (image != thumbnail).any(axis=2)
    assert not changed[np.isnan(values)].any()
    assert changed[np.isfinite(values)].mean() > 0.99


@pytest.mark.parametrize("kind", ["diverging", "sequential"])
def test_pixels_are_the_mixture_of_colour_and_grey_within_one_level(
    thumbnail: np.ndarray, values: np.ndarray, kind: str
) -> None:
    limits = colour_limit(values, kind)
    opacity = 0.2 + 0.6 * strengths_of(values.clip(*limits), limits)[..., None]
    grey = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)[..., None]
    expected = opacity * coloured(values, limits, COLOUR_MAPS[kind][0]) + (1 - opacity) * grey
    expected = np.where(np.isnan(values)[..., None], thumbnail, expected)
    assert np.abs(blend(thumbnail, values, kind) - expected).max() <= 1


def test_a_picture_that_has_begun_is_finished_in_any_thread_and_is_the_same(
    tmp_path: Path, thumbnail: np.ndarray, values: np.ndarray
) -> None:
    begun = [
        begin_heatmap(tmp_path / f"{name}.png", thumbnail, values, name * 3, "relevance", "diverging", 8.0)
        for name in "abcd"
    ]
    assert list(tmp_path.iterdir()) == []
    with ThreadPoolExecutor(2) as threads:
        for finished in [threads.submit(finish) for finish in begun]:
            finished.result()
    for name in "abcd":
        write_heatmap(tmp_path / "same.png", thumbnail, values, name * 3, "relevance", "diverging", 8.0)
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / "same.png").read_bytes()


@pytest.mark.parametrize("kind", ["diverging", "sequential"])
def test_png_holds_the_thumbnail_unresampled_below_the_title(
    tmp_path: Path, thumbnail: np.ndarray, values: np.ndarray, kind: str
) -> None:
    title = "a $title$ of {class} 'high', " * 6
    write_heatmap(tmp_path / "map.png", thumbnail, values, title, "relevance", kind)
    png = read_png(tmp_path / "map.png")
    body = png[-300:, :500]
    np.testing.assert_array_equal(body, blend(thumbnail, values, kind))
    np.testing.assert_array_equal(body[np.isnan(values)], thumbnail[np.isnan(values)])
    assert png.shape[1] > 500
    assert (png[-300:, 500:] < 128).any(), "the colour bar's ticks"
    assert (png[:-300] < 128).any(), "the title"
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (4, 2000)])
def test_tiny_and_narrow_slides_have_a_map(tmp_path: Path, shape: tuple[int, int]) -> None:
    write_heatmap(tmp_path / "map.png", np.zeros((*shape, 3), np.uint8), np.zeros(shape), "t", "l", "diverging")
    assert read_png(tmp_path / "map.png").shape[1] >= shape[1]


def test_zero_lies_in_the_middle_of_a_diverging_map() -> None:
    grey = np.full((1, 3, 3), 128, dtype=np.uint8)
    negative, zero, positive = blend(grey, np.array([[-1.0, 0.0, 4.0]]), "diverging")[0].astype(int)
    assert colour_limit(np.array([[-1.0, 0.0, 4.0]]), "diverging") == pytest.approx((-4.0, 4.0), rel=0.01)
    assert np.ptp(zero) <= 2, "zero is neutral"
    assert negative[2] > negative[0], "against is blue"
    assert positive[0] > positive[2], "for is red"


def test_outliers_do_not_stretch_the_colours() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, size=(100, 100))
    values[0, 0] = 1e6
    assert colour_limit(values, "diverging") == pytest.approx((-1, 1), rel=0.01)


@pytest.mark.parametrize("values", [np.full((2, 2), np.nan), np.zeros((2, 2))])
def test_empty_and_constant_maps_have_limits(values: np.ndarray) -> None:
    assert colour_limit(values, "diverging") == (-1.0, 1.0)
    assert colour_limit(values, "sequential") == (0.0, 1.0)


def test_mask_overlay_leaves_glass_untouched(tmp_path: Path, thumbnail: np.ndarray) -> None:
    mask = np.zeros((30, 50), dtype=bool)
    mask[10:20, 5:30] = True
    write_mask_overlay(tmp_path / "m.png", thumbnail, TissueMask(mask, 8.0, (40.0, 40.0), "file", 0.17), 2000)
    image = read_png(tmp_path / "m.png")
    tissue = np.repeat(np.repeat(mask, 10, axis=0), 10, axis=1)
    np.testing.assert_array_equal(image[~tissue], thumbnail[~tissue])
    assert (image[tissue] != thumbnail[tissue]).any(axis=1).mean() > 0.9


# Machado, Oliveira and Fernandes (2009), of light: no red, no green, no blue cones.
SIGHT = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(rgb_N3: np.ndarray, sight: str) -> np.ndarray:
    """Colours in CIELAB as somebody with this colour vision sees them."""
    srgb = rgb_N3.astype(np.float64) / 255
    light = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ np.array(SIGHT[sight]).T
    light = light.clip(0, 1)
    shown = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return cv2.cvtColor(shown[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_can_be_told_apart_with_every_kind_of_colour_vision(sight: str) -> None:
    values = np.array([-1.0, -0.2, 0.0, 0.2, 1.0])
    for shades, least in (
        (coloured(values, (-1, 1), COLOUR_MAPS["diverging"][0]), 15),
        (coloured(values[2:], (0, 1), COLOUR_MAPS["sequential"][0]), 15),
        (np.array(PALETTE), 10),
    ):
        lab = seen(shades, sight)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)
        assert apart[~np.eye(len(lab), dtype=bool)].min() > least


@pytest.mark.parametrize("kind", ["diverging", "sequential"])
def test_tissue_shows_through_where_a_map_says_little(kind: str) -> None:
    checks = np.array([[0, 255] * 3], np.uint8).repeat(3, 0)[..., None].repeat(3, 2)
    image = blend(
        checks, np.array([[0, 0, 0.1, 0.1, 1, 1]] * 3, float), kind, (-1.0 if kind == "diverging" else 0.0, 1.0)
    )
    contrast = np.ptp(image[0].reshape(3, 2, 3).astype(int).mean(axis=2), axis=1)
    assert contrast[0] > contrast[1] > contrast[2] > 30


@pytest.mark.parametrize(("um_per_px", "length_px", "length_um"), [(0.5, 40, 20), (8.0, 62.5, 500), (16.3, 61.3, 1000)])
def test_the_scale_bar_has_a_round_length_and_is_drawn_to_scale(
    tmp_path: Path, thumbnail: np.ndarray, values: np.ndarray, um_per_px: float, length_px: float, length_um: float
) -> None:
    write_heatmap(tmp_path / "map.png", thumbnail, values, "t", "l", "diverging", um_per_px)
    column = read_png(tmp_path / "map.png")[-60:, 500:]
    black = (column < 60).all(axis=2)
    longest = black.sum(axis=1).max()
    assert longest == pytest.approx(length_px, abs=1.5)
    assert round_length(86 * um_per_px) == length_um


def test_limits_that_are_given_are_those_of_the_colours(thumbnail: np.ndarray, values: np.ndarray) -> None:
    wide = blend(thumbnail, values, "diverging", (-100.0, 100.0))
    own = blend(thumbnail, values, "diverging")
    known = np.isfinite(values)
    assert np.ptp(wide[known].astype(int), axis=1).mean() < np.ptp(own[known].astype(int), axis=1).mean() / 2


def test_smoothing_removes_steps_and_leaves_background_and_flat_areas_unchanged() -> None:
    values = np.full((60, 90), np.nan)
    values[10:50, 5:45], values[10:50, 45:85] = 1.0, -1.0
    drawn = smoothed(values, 5.0)
    np.testing.assert_array_equal(np.isnan(drawn), np.isnan(values))
    assert np.abs(np.diff(drawn[30, 5:85])).max() < 0.2
    np.testing.assert_allclose(drawn[30, [5, 84]], [1, -1], atol=1e-3)
    np.testing.assert_allclose(smoothed(np.where(np.isnan(values), np.nan, 3.0), 5.0)[10:50, 5:85], 3.0, rtol=1e-5)

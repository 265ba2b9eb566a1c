"""Draw the report's pictures as data URIs: the slide with its kept tissue outlined, maps, and tiles with token maps.

Dimension key: (Y, X) pixels of a picture, (h, w) tokens of a tile, M maps.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import cv2
import numpy as np

from maskattn.shapes import Bool, Float, UInt8
from maskattn.slide.colours import colour_table, coloured, strengths_of
from maskattn.slide.finished import Mosaic
from maskattn.slide.report.markup import Markup, element

__all__ = ["OVERVIEW_PX", "colour_bar", "map_over", "outlined", "picture", "sampled", "tile_with_map", "with_squares"]

OVERVIEW_PX = 760
_OUTLINE = (0, 150, 60)
_MOST_OPACITY, _LEAST_OPACITY = 0.85, 0.15
_QUALITY = 82


def picture(rgb_YX3: UInt8[np.ndarray, "Y X 3"], alt: str) -> Markup:
    """Return an image element with the JPEG embedded as a data URI."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(rgb_YX3).save(data, format="JPEG", quality=_QUALITY)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return element("img", src=source, alt=alt, width=rgb_YX3.shape[1], height=rgb_YX3.shape[0])


def sampled(mosaic: Mosaic, size_lv0: tuple[int, int], shape_px: tuple[int, int]) -> Float[np.ndarray, "Y X"]:
    """Sample a map at the centres of the pixels of a picture of the whole slide.

    Args:
        mosaic: the map.
        size_lv0: width and height of the slide in level-0 pixels.
        shape_px: rows and columns of the picture.
    """
    per_px = size_lv0[0] / shape_px[1], size_lv0[1] / shape_px[0]
    level = 0
    while level + 1 < len(mosaic.levels) and mosaic.step_lv0 * 2 ** (level + 1) <= max(per_px):
        level += 1
    values, step = mosaic.levels[level], mosaic.step_lv0 * 2**level
    columns, rows = (
        np.minimum(((np.arange(count) + 0.5) * lv0 / step).astype(np.intp), limit - 1)
        for count, lv0, limit in zip(reversed(shape_px), per_px, reversed(values.shape), strict=True)
    )
    sample: np.ndarray = values[np.ix_(rows, columns)]
    return sample


def outlined(thumbnail_YX3: UInt8[np.ndarray, "Y X 3"], part_YX: Bool[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "Y X 3"]:
    """Return the thumbnail with a line around the area that took part."""
    image = thumbnail_YX3.copy()
    contours, _ = cv2.findContours(part_YX.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, _OUTLINE, 1)
    return image


def map_over(
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"],
    limits: tuple[float, float],
    colours: str,
) -> UInt8[np.ndarray, "Y X 3"]:
    """Return the thumbnail, grey where the map has values, under the map; opacity grows with distance from zero."""
    known = np.isfinite(values_YX)
    far = strengths_of(values_YX, limits)
    opacity = (_LEAST_OPACITY + (_MOST_OPACITY - _LEAST_OPACITY) * far)[known][:, None]
    grey = cv2.cvtColor(thumbnail_YX3, cv2.COLOR_RGB2GRAY)[known][:, None]
    image = thumbnail_YX3.copy()
    mixed = (1 - opacity) * grey + opacity * coloured(values_YX[known], limits, colours)
    image[known] = np.rint(mixed).astype(np.uint8)
    return image


def tile_with_map(
    tile_YX3: UInt8[np.ndarray, "Y X 3"],
    values_hw: Float[np.ndarray, "h w"],
    limits: tuple[float, float],
    colours: str,
) -> UInt8[np.ndarray, "Y X 3"]:
    """Return a tile with its token map over it."""
    size = tile_YX3.shape[1], tile_YX3.shape[0]
    values = cv2.resize(values_hw.astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
    return map_over(tile_YX3, values, limits, colours)


def with_squares(
    image_YX3: UInt8[np.ndarray, "Y X 3"],
    corners_lv0: Sequence[tuple[int, int]],
    side_lv0: int,
    lv0_per_px: float,
    colour: tuple[int, int, int],
) -> UInt8[np.ndarray, "Y X 3"]:
    """Return a picture of the whole slide with squares around tiles, each at least nine pixels wide."""
    image = image_YX3.copy()
    for x_lv0, y_lv0 in corners_lv0:
        centre = (x_lv0 + side_lv0 / 2) / lv0_per_px, (y_lv0 + side_lv0 / 2) / lv0_per_px
        reach = max(side_lv0 / lv0_per_px / 2, 4.5)
        first, last = ([round(c + sign * reach) for c in centre] for sign in (-1, 1))
        cv2.rectangle(image, first, last, (255, 255, 255), 5)
        cv2.rectangle(image, first, last, colour, 2)
    return image


def colour_bar(limits: tuple[float, float], colours: str) -> Markup:
    """Return a colour scale labelled with its ends and its middle."""
    stops = ", ".join("#" + bytes(colour_table(colours)[index].tolist()).hex() for index in range(0, 256, 15))
    bar = element("span", class_="bar", style=f"background: linear-gradient(to right, {stops})")
    middle = "0" if limits[0] < 0 else f"{limits[1] / 4:.3g}"
    ends = [element("span", text.replace("-", "−")) for text in (f"{limits[0]:.3g}", middle, f"{limits[1]:.3g}")]
    return element("span", bar, element("span", *ends, class_="ends"), class_="scale")

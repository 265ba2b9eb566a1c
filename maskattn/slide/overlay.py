"""Overlay: maps of tokens or tiles over the slide's thumbnail, as PNG.

A map is painted tile by tile at the thumbnail's resolution, so that memory does not grow with the slide. A thumbnail
pixel belongs to the token that contains its centre; pixels without a kept token are those of the thumbnail, bit for
bit.

Dimension key: M maps, (Y, X) thumbnail pixels, B tiles of a batch, (h, w) tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskattn.lettering import wrapped
from maskattn.png_files import write_png
from maskattn.shapes import Bool, Float, Int, UInt8
from maskattn.slide.colours import COLOUR_MAPS, Kind, colour_limit, colour_table, positions_of, strengths_of_colours
from maskattn.slide.legends import draw_colour_bar, draw_scale_bar, draw_text

if TYPE_CHECKING:
    from maskattn.slide.tissue import TissueMask

__all__ = [
    "MapCanvas",
    "begin_heatmap",
    "blend",
    "smoothed",
    "write_heatmap",
    "write_mask_overlay",
]

_OPACITY = (0.2, 0.8)  # of a map's zeros, and of its values at the ends of the scale
_BAR_PX = 110
_MOST_BAR_PX = 400
_SCALE_BAR_PX = 52  # the height that it takes with its label
_LINE_PX, _BASELINE_PX = 17, 11
_MARGIN_PX = 6
_TITLE_PT = 9
_MIN_BODY_PX = (420, 240)
_TISSUE_COLOUR = (0, 150, 60)


class MapCanvas:
    """Maps at the thumbnail's resolution, painted tile by tile; NaN in pixels without a kept token.

    Args:
        maps: M, the number of maps, which are painted together.
        thumbnail_px: (height, width) of the thumbnail.
        slide_px: (height, width) of the slide at level 0.
        tile_lv0: side of a tile in level-0 pixels.
    """

    def __init__(self, maps: int, thumbnail_px: tuple[int, int], slide_px: tuple[int, int], tile_lv0: int) -> None:
        self.values_MYX: Float[np.ndarray, "M Y X"] = np.full((maps, *thumbnail_px), np.nan, dtype=np.float32)
        self._lv0_per_px = (slide_px[0] / thumbnail_px[0], slide_px[1] / thumbnail_px[1])
        self._tile_lv0 = tile_lv0

    def paint(
        self,
        coords_B2: Int[np.ndarray, "B 2"],
        values_MBhw: Float[np.ndarray, "M B h w"],
        keep_Bhw: Bool[np.ndarray, "B h w"],
    ) -> None:
        """Paint the kept tokens of some tiles.

        Args:
            coords_B2: (B, 2) level-0 x, y of the tiles' top left corners.
            values_MBhw: (M, B, h, w) one value per token, or (M, B, 1, 1) one per tile.
            keep_Bhw: (B, h, w) bool, True for kept tokens.
        """
        values_MBhw = np.broadcast_to(values_MBhw, (len(values_MBhw), *keep_Bhw.shape))
        for tile, (x_lv0, y_lv0) in enumerate(coords_B2):
            rows, row_of_pixel = self._pixels(0, int(y_lv0), keep_Bhw.shape[1])
            columns, column_of_pixel = self._pixels(1, int(x_lv0), keep_Bhw.shape[2])
            painted = keep_Bhw[tile].take(row_of_pixel, axis=0).take(column_of_pixel, axis=1)
            view = self.values_MYX[:, rows, columns]
            for target, source in zip(view, values_MBhw[:, tile], strict=True):
                np.copyto(target, source.take(row_of_pixel, axis=0).take(column_of_pixel, axis=1), where=painted)

    def _pixels(self, axis: int, start_lv0: int, tokens: int) -> tuple[slice, np.ndarray]:
        """Return the thumbnail pixels whose centres are in a tile along one axis, and the token of each centre."""
        step = self._lv0_per_px[axis]
        limit = self.values_MYX.shape[1 + axis]
        first, last = (
            min(max(int(np.ceil(edge / step - 0.5)), 0), limit) for edge in (start_lv0, start_lv0 + self._tile_lv0)
        )
        centres_lv0 = (np.arange(first, last) + 0.5) * step - start_lv0
        token = np.floor(centres_lv0 * tokens / self._tile_lv0).astype(np.intp)
        return slice(first, last), token.clip(0, tokens - 1)


def blend(
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"],
    kind: Kind,
    limits: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "Y X 3"]:
    """Return the thumbnail with a map laid over it; pixels whose value is NaN are those of the thumbnail.

    Args:
        thumbnail_YX3: (Y, X, 3) RGB.
        values_YX: (Y, X) the map.
        kind: the kind of the map.
        limits: the values at the ends of the colour map; None = from the map, by
            :func:`maskattn.slide.colours.colour_limit`.
    """
    import cv2

    limits = limits or colour_limit(values_YX, kind)
    known = np.isfinite(values_YX)
    # The thumbnail is grey below the map, so that every hue is the map's and not the stain's.
    grey_YX = cv2.cvtColor(thumbnail_YX3, cv2.COLOR_RGB2GRAY)
    positions = np.rint(255 * positions_of(np.where(known, values_YX, np.float32(0)), limits))
    mixtures = _mixtures(kind, limits).reshape(-1)
    # Four bytes a pixel are taken several times as fast as three.
    mixed = mixtures.take((positions.astype(np.intp) << 8) | grey_YX).view(np.uint8).reshape(*grey_YX.shape, 4)
    image: np.ndarray = cv2.cvtColor(mixed, cv2.COLOR_RGBA2RGB)
    cv2.copyTo(thumbnail_YX3, (~known).view(np.uint8), image)
    return image


def _mixtures(kind: Kind, limits: tuple[float, float]) -> np.ndarray:
    """Return the mixture of each of a map's 256 colours with each of the thumbnail's 256 greys.

    They are (256, 256) uint32, whose bytes in memory are red, green, blue and nothing.
    """
    # Tissue of little relevance shows through.
    least, most = _OPACITY
    opacity = (least + (most - least) * strengths_of_colours(limits))[:, None, None]
    mixed = opacity * colour_table(COLOUR_MAPS[kind][0])[:, None] + (1 - opacity) * np.arange(256)[:, None]
    bytes_of = np.zeros((256, 256, 4), np.uint8)
    np.rint(mixed, out=bytes_of[..., :3], casting="unsafe")
    return bytes_of.view(np.uint32)


def smoothed(values_YX: Float[np.ndarray, "Y X"], sigma_px: float) -> Float[np.ndarray, "Y X"]:
    """Smooth the steps of a map: each pixel becomes a weighted mean of the finite pixels around it; NaN stays NaN.

    Args:
        values_YX: (Y, X) the map.
        sigma_px: standard deviation of the weights, a Gaussian, in pixels.
    """
    import cv2

    known = np.isfinite(values_YX)
    sums, weights = (
        cv2.GaussianBlur(plane.astype(np.float32), (0, 0), max(sigma_px, 0.1), borderType=cv2.BORDER_CONSTANT)
        for plane in (np.where(known, values_YX, 0.0), known)
    )
    drawn = np.full(values_YX.shape, np.nan, np.float32)
    drawn[known] = sums[known] / weights[known]
    return drawn


def begin_heatmap(
    path: Path,
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"],
    title: str,
    label: str,
    kind: Kind,
    um_per_px: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Callable[[], None]:
    """Draw what surrounds a map, and return the function that lays it over the thumbnail and writes the picture.

    The picture has a title above the map, and a colour bar and a scale bar at its right. The thumbnail is not
    resampled: it starts below the title at the left edge. The function may be called in another thread, since it
    draws no text; fonts are not safe to share. It raises an OSError if the file cannot be written.

    Args:
        path: the PNG.
        thumbnail_YX3: (Y, X, 3) RGB.
        values_YX: (Y, X) the map; NaN = background, left untouched.
        title: the picture's title; characters that no font of this machine has become question marks.
        label: the quantity that the colour bar measures.
        kind: "diverging" fixes zero in the middle (CDAM), "sequential" starts at zero (attention).
        um_per_px: µm per thumbnail pixel, for the scale bar; None draws no scale bar.
        limits: the values at the ends of the colour map; None = from the map.
    """
    height, width = thumbnail_YX3.shape[:2]
    body = max(width, _MIN_BODY_PX[0]), max(height, _MIN_BODY_PX[1])
    lines = wrapped(title, body[0] + _BAR_PX - 2 * _MARGIN_PX, _TITLE_PT)
    head = 2 * _MARGIN_PX + _LINE_PX * len(lines)
    limits = limits or colour_limit(values_YX, kind)
    image = np.full((head + body[1], body[0] + _BAR_PX, 3), 255, np.uint8)
    for index, line in enumerate(lines):
        draw_text(image, line, _MARGIN_PX, _MARGIN_PX + _BASELINE_PX + _LINE_PX * index, _TITLE_PT)
    strip, bar_px = image[:, body[0] :], min(body[1] - 20 - _SCALE_BAR_PX, _MOST_BAR_PX)
    draw_colour_bar(strip, head + 10, bar_px, limits, COLOUR_MAPS[kind][0], f"{label}; square-root scale")
    if um_per_px is not None:
        draw_scale_bar(strip, head + 10 + bar_px + 20, um_per_px)

    def finish() -> None:
        image[head : head + height, :width] = blend(thumbnail_YX3, values_YX, kind, limits)
        write_png(path, image)

    return finish


def write_heatmap(
    path: Path,
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"],
    title: str,
    label: str,
    kind: Kind,
    um_per_px: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Write the picture of :func:`begin_heatmap` at once.

    Raises:
        OSError: the file cannot be written.
    """
    begin_heatmap(path, thumbnail_YX3, values_YX, title, label, kind, um_per_px, limits)()


def write_mask_overlay(
    path: Path, thumbnail_YX3: UInt8[np.ndarray, "Y X 3"], tissue: TissueMask, width_lv0: int
) -> None:
    """Write the thumbnail with the tissue outlined and tinted; glass stays as it is.

    Args:
        path: the PNG.
        thumbnail_YX3: (Y, X, 3) RGB.
        tissue: the mask.
        width_lv0: the slide's width in level-0 pixels; the thumbnail shows the whole slide.

    Raises:
        OSError: the file cannot be written.
    """
    import cv2

    step = width_lv0 / thumbnail_YX3.shape[1]
    rows, columns = (
        np.minimum(((np.arange(size) + 0.5) * step / px_lv0).astype(np.intp), limit - 1)
        for size, px_lv0, limit in zip(
            thumbnail_YX3.shape[:2], (tissue.px_lv0[1], tissue.px_lv0[0]), tissue.mask_HW.shape, strict=True
        )
    )
    mask = tissue.mask_HW[np.ix_(rows, columns)]
    image = thumbnail_YX3.copy()
    image[mask] = np.rint(0.75 * thumbnail_YX3[mask] + 0.25 * np.array(_TISSUE_COLOUR)).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, _TISSUE_COLOUR, 1)
    write_png(path, image)

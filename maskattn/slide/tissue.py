"""Where the tissue lies: found on a coarse view of the slide, or read from the user's own mask.

Finding works on the saturation of the colours, for stains are saturated and glass is not: median blur, Otsu's
threshold (held within bounds, because Otsu splits any picture in two, all-glass and all-tissue ones too), ink taken
out by its hue, closing, and areas filtered in µm².
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import cv2
import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Bool, Int, UInt8
from maskattn.slide.mask_file import read_mask_plane
from maskattn.slide.reader import SlideInfo, SlideReader

__all__ = ["TissueMask", "find_tissue", "load_mask"]

_MAX_MASK_PX = 32 << 20
_MEDIAN_PX = 3
_CLOSING_UM = 40.0

# Saturation, 0 to 255. Glass, tinted or lit by a warm lamp, stays below the ceiling; stains seldom below the floor.
_SATURATION_FLOOR = 12
_SATURATION_CEILING = 40
_OTSU_CONTRAST = 10

# OpenCV's hue, 0 to 179: green and blue inks. Haematoxylin alone can be blue too, but pale.
_GREEN_HUE, _GREEN_SATURATION = (35, 95), 40
_BLUE_HUE, _BLUE_SATURATION = (96, 118), 130
_BLACK_VALUE = 40
_INK_MARGIN_UM = 24.0


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Which parts of a slide are tissue. The mask covers the slide exactly: its corners are the slide's.

    Attributes:
        mask_HW: (H, W) bool, True = tissue.
        spacing_um: µm per mask pixel, the mean of both axes.
        px_lv0: width and height of a mask pixel in level-0 pixels.
        method: how it was made: "saturation", or "file".
        tissue_fraction: tissue pixels / all pixels.
        notes: what the user should know of it, e.g. that no tissue was found.
    """

    mask_HW: Bool[np.ndarray, "H W"]
    spacing_um: float
    px_lv0: tuple[float, float]
    method: str
    tissue_fraction: float
    notes: tuple[str, ...] = ()


def find_tissue(
    reader: SlideReader,
    spacing_um: float = 8.0,
    *,
    min_tissue_um2: float = 8_000.0,
    max_hole_um2: float = 8_000.0,
    reject_ink: bool = True,
) -> TissueMask:
    """Find the tissue of a stained slide.

    Never fails for what the slide shows: a slide without tissue gives an empty mask, and a note that says so. Green,
    blue and black ink is taken out, with a margin of 24 µm; red ink looks like eosin and stays.

    Args:
        reader: the slide.
        spacing_um: µm per pixel of the view to work on; a slide that is coarser is used as it is.
        min_tissue_um2: smaller pieces of tissue are dropped as dust; on a tiny slide at most half its area.
        max_hole_um2: smaller holes in the tissue are filled.
        reject_ink: whether to take out ink.

    Raises:
        ValueError: ``spacing_um`` is not above 0.
        SlideError: the slide has no plausible spacing, or cannot be read.
    """
    if not (math.isfinite(spacing_um) and spacing_um > 0):
        raise ValueError(f"find_tissue needs a spacing above 0, got spacing_um={spacing_um}; 8 to 10 µm serves well")
    info = reader.info
    notes = []
    shrink = max(1.0, spacing_um / info.spacing_um)
    if info.width_px * info.height_px / shrink**2 > _MAX_MASK_PX:
        shrink = math.sqrt(info.width_px * info.height_px / _MAX_MASK_PX)
        notes.append(f"tissue was sought at {shrink * info.spacing_um:.3g} µm per pixel, to bound the memory")
    size = (max(1, round(info.width_px / shrink)), max(1, round(info.height_px / shrink)))
    rgb = reader.read_region(0, 0, (info.width_px, info.height_px), size)
    px_lv0 = (info.width_px / size[0], info.height_px / size[1])
    px_um = info.spacing_um * (px_lv0[0] + px_lv0[1]) / 2

    mask, ink = _stained(rgb, px_um, reject_ink)
    if ink.any():
        mask &= ~ink
        notes.append(f"ink was taken out: {ink.mean():.2%} of the slide")
    mask = _closed(mask, px_um)
    least_px = min(min_tissue_um2 / px_um**2, mask.size / 2)
    mask = _without_pieces_below(mask, least_px)
    mask = ~_without_pieces_below(~mask, min(max_hole_um2 / px_um**2, mask.size / 2))
    mask &= ~ink
    return _tissue_mask(mask, info, "saturation", notes)


def load_mask(
    path: str | os.PathLike[str], info: SlideInfo, tissue_values: tuple[int, ...] | list[int] | None = None
) -> TissueMask:
    """Read the user's own mask: PNG, TIFF (pyramids too) or whatever else Pillow opens, at any spacing.

    The mask must cover the whole slide: its sides must be in the slide's proportion, within 1 % or one mask pixel.
    Of a colour image the first channel counts; of a palette image, the indices.

    Args:
        path: the mask file.
        info: the slide that it belongs to.
        tissue_values: the label values that are tissue; by default every value but 0.

    Raises:
        SlideError: the file is missing or cannot be read, or the mask is not in the slide's proportion.
    """
    plane = read_mask_plane(path, info)
    height, width = plane.shape
    if not _in_proportion((width, height), (info.width_px, info.height_px)):
        raise SlideError(
            "a mask must cover its whole slide, so be in its proportion within 1 % or one mask pixel, got a mask of "
            f"{width} × {height} px in '{path}' for a slide of {info.width_px} × {info.height_px} px; export the mask "
            "for the whole slide, at any spacing"
        )
    notes = []
    if tissue_values is None:
        mask = plane != 0
    else:
        mask = np.isin(plane, np.asarray(tissue_values))
        if not mask.any():
            found = ", ".join(str(value) for value in np.unique(plane)[:10])
            wanted = ", ".join(str(value) for value in tissue_values)
            notes.append(f"the mask holds none of the tissue values {wanted}; it holds {found}")
    return _tissue_mask(mask, info, "file", notes)


def _in_proportion(mask_px: tuple[int, int], slide_px: tuple[int, int]) -> bool:
    """Whether a side of the mask is what its other side calls for, within 1 % or one pixel."""
    (width, height), (slide_width, slide_height) = mask_px, slide_px
    height_off = abs(width * slide_height / slide_width - height)
    width_off = abs(height * slide_width / slide_height - width)
    return height_off <= max(1.0, 0.01 * height) or width_off <= max(1.0, 0.01 * width)


def _tissue_mask(mask_HW: np.ndarray, info: SlideInfo, method: str, notes: list[str]) -> TissueMask:
    height, width = mask_HW.shape
    px_lv0 = (info.width_px / width, info.height_px / height)
    fraction = float(mask_HW.mean())
    if fraction == 0.0:
        notes = [
            *notes,
            "no tissue was found: the slide is empty, or its stain too pale; a mask file can say otherwise",
        ]
    elif fraction > 0.98:
        notes = [*notes, f"{fraction:.1%} of the slide is tissue: there is hardly any glass"]
    return TissueMask(
        mask_HW=np.ascontiguousarray(mask_HW, dtype=bool),
        spacing_um=info.spacing_um * (px_lv0[0] + px_lv0[1]) / 2,
        px_lv0=px_lv0,
        method=method,
        tissue_fraction=fraction,
        notes=tuple(notes),
    )


def _stained(rgb: UInt8[np.ndarray, "H W 3"], px_um: float, reject_ink: bool) -> tuple[np.ndarray, np.ndarray]:
    """The pixels saturated enough to be stained, and those of ink; both (H, W) bool."""
    hue, saturation, value = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    ink = np.zeros(hue.shape, bool)
    if reject_ink:
        ink = _ink(hue, saturation, value, px_um)
    saturation = cv2.medianBlur(saturation, _MEDIAN_PX)
    # Ink is more saturated than any stain and would drag the threshold up.
    histogram = np.bincount(saturation[~ink], minlength=256)
    return saturation > saturation_threshold(histogram), ink


def saturation_threshold(histogram_256: Int[np.ndarray, " 256"]) -> int:
    """Otsu's threshold of a histogram of saturations, held within bounds: above it is stained.

    Where Otsu's two classes differ by less than 10 in their means, the slide is of one material, and only its height
    tells which: it is stained above the ceiling. Source: N. Otsu, IEEE Trans. SMC 9(1), 1979.
    """
    levels = np.arange(256)
    below = histogram_256.cumsum().astype(np.float64)
    above = below[-1] - below
    mass = (histogram_256 * levels).cumsum().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        contrast = (mass[-1] - mass) / above - mass / below
    variance = np.nan_to_num(below * above * contrast**2)
    # Between two separate classes every threshold is as good: take the middle.
    best = np.flatnonzero(variance == variance.max())
    threshold = int(best[(len(best) - 1) // 2])
    if not contrast[threshold] >= _OTSU_CONTRAST:
        return _SATURATION_CEILING
    return min(max(threshold, _SATURATION_FLOOR), _SATURATION_CEILING)


def _ink(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray, px_um: float) -> np.ndarray:
    green = (hue >= _GREEN_HUE[0]) & (hue <= _GREEN_HUE[1]) & (saturation >= _GREEN_SATURATION)
    blue = (hue >= _BLUE_HUE[0]) & (hue <= _BLUE_HUE[1]) & (saturation >= _BLUE_SATURATION)
    ink = (green | blue | (value < _BLACK_VALUE)).astype(np.uint8)
    # Single pixels are noise of the compression, not a pen's stroke.
    ink = cv2.morphologyEx(ink, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    return cv2.dilate(ink, _disc(_INK_MARGIN_UM / px_um)).astype(bool)


def _closed(mask: np.ndarray, px_um: float) -> np.ndarray:
    disc = _disc(_CLOSING_UM / 2 / px_um)
    pad = disc.shape[0] // 2
    # Closing must not be stopped by the slide's edge, nor treat the outside as tissue.
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)
    return closed[pad : pad + mask.shape[0], pad : pad + mask.shape[1]].astype(bool)


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _without_pieces_below(mask: np.ndarray, least_px: float) -> np.ndarray:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    stays = stats[:, cv2.CC_STAT_AREA] >= least_px
    stays[0] = False
    return stays[labels]

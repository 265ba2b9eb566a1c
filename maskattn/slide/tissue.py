"""Where the tissue lies, found on a coarse view of the slide.

Finding works on the saturation of the colours, for stains are saturated and glass is not: median blur, Otsu's
threshold (held within bounds, because Otsu splits any picture in two, all-glass and all-tissue ones too), ink taken
out by its hue, closing, and areas filtered in µm².
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from maskattn.shapes import Int, UInt8
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue_mask import TissueMask, mask_of_slide

__all__ = ["TissueMask", "find_tissue"]

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
    rgb = reader.read_region(0, 0, (info.width_px, info.height_px), size, tolerant=True)
    notes.extend(reader.notes)
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
    if not mask.any():
        notes.append("no tissue was found: the slide is empty, or its stain too pale; a mask file can say otherwise")
    return mask_of_slide(mask, info, "saturation", notes)


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

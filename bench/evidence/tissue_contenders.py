"""Methods of tissue detection that ``tissue.py`` compares with this package's, on a view of 8 µm per pixel, (H, W, 3).

*saturation*: this package's former method: one threshold of the saturation for the slide, ink excluded by its hue.
*CLAM*: as described by Lu et al. 2021, with the defaults of its patching script: median blur of the saturation by 7,
threshold 8, closing by 4, and removal of pieces under 100 and holes under 16 patches of 512 px at 0.25 µm.
*TRIDENT, Otsu*: its classical segmenter as described by Zhang et al. 2025, in tiles of 512 px at 8 µm: nearly grey and
dark pixels become white, then Otsu's threshold of the brightness is applied twice, without objects up to 60 px and
holes up to 5,000 px. All are written anew from their descriptions; none of their code is used.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

__all__ = ["VIEW_UM", "clam", "saturation", "trident_otsu"]

VIEW_UM = 8.0
_CLAM_UM, _CLAM_PATCH_MM2 = 16.0, (512 * 0.25e-3) ** 2
# CLAM's smallest piece (1.6 mm²) is not meant for slides smaller than this: there, every piece stays.
_CLAM_LEAST_SLIDE_MM2 = 25.0


def pieces(mask: np.ndarray, keeps: Callable[[np.ndarray], np.ndarray], connectivity: int = 8) -> np.ndarray:
    """Return the connected pieces of a mask for whose areas, in px, ``keeps`` is true."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    stays = keeps(stats[:, cv2.CC_STAT_AREA])
    stays[0] = False
    return stays[labels]


def saturation(rgb: np.ndarray) -> np.ndarray:
    """Find tissue by one threshold of the saturation for the entire slide, with ink excluded by its hue."""
    hue, level, value = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    green, blue = (hue >= 35) & (hue <= 95) & (level >= 40), (hue >= 96) & (hue <= 118) & (level >= 130)
    ink = cv2.morphologyEx((green | blue | (value < 40)).astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    ink = cv2.dilate(ink, ellipse(3)) > 0
    level = cv2.medianBlur(level, 3)
    stained = (level > bounded_otsu(np.bincount(level[~ink], minlength=256))) & ~ink
    padded = cv2.copyMakeBorder(stained.astype(np.uint8), 2, 2, 2, 2, cv2.BORDER_REPLICATE)
    mask = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, ellipse(2))[2:-2, 2:-2] > 0
    least = min(8000 / VIEW_UM**2, mask.size / 2)
    mask = pieces(mask, lambda area: area >= least)
    return ~pieces(~mask, lambda area: area >= least) & ~ink


def bounded_otsu(histogram: np.ndarray) -> int:
    below = histogram.cumsum().astype(np.float64)
    above, mass = below[-1] - below, (histogram * np.arange(256)).cumsum().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        contrast = (mass[-1] - mass) / above - mass / below
    variance = np.nan_to_num(below * above * contrast**2)
    best = np.flatnonzero(variance == variance.max())
    threshold = int(best[(len(best) - 1) // 2])
    return min(max(threshold, 12), 40) if contrast[threshold] >= 10 else 40


def ellipse(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def clam(rgb: np.ndarray) -> np.ndarray:
    """Find tissue as CLAM does, by a fixed threshold of the saturation at 16 µm per pixel (64 times 0.25 µm)."""
    size = (max(1, round(rgb.shape[1] / 2)), max(1, round(rgb.shape[0] / 2)))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    level = cv2.medianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2HSV)[..., 1], 7)
    mask = cv2.morphologyEx((level > 8).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8)) > 0
    patch_px = _CLAM_PATCH_MM2 / (_CLAM_UM / 1000) ** 2
    if mask.size * (_CLAM_UM / 1000) ** 2 >= _CLAM_LEAST_SLIDE_MM2:
        mask = pieces(mask, lambda area: area > 100 * patch_px)
    mask |= enclosed(~mask) & ~pieces(~mask, lambda area: area > 16 * patch_px, connectivity=4)
    return cv2.resize(mask.astype(np.uint8), rgb.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0


def enclosed(background: np.ndarray) -> np.ndarray:
    """Return the background that is not connected to the edge of the picture."""
    _, labels = cv2.connectedComponents(np.pad(background, 1, constant_values=True).astype(np.uint8), connectivity=4)
    return (labels > 0)[1:-1, 1:-1] & (labels != labels[0, 0])[1:-1, 1:-1]


def trident_otsu(rgb: np.ndarray) -> np.ndarray:
    """Find tissue as TRIDENT's classical segmenter does, tile by tile."""
    mask = np.zeros(rgb.shape[:2], bool)
    for top in range(0, rgb.shape[0], 512):
        for left in range(0, rgb.shape[1], 512):
            tile = (slice(top, top + 512), slice(left, left + 512))
            mask[tile] = otsu_twice(rgb[tile])
    return mask


def otsu_twice(rgb: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    blank = ((hsv[..., 1] <= 10) & (hsv[..., 2] >= 70)) | (hsv[..., 2] <= 85)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    grey[blank] = 255
    first = pieces(below_otsu(grey), lambda area: area > 60, connectivity=4)
    second = below_otsu(np.where(first, grey, 255).astype(np.uint8))
    return ~pieces(~second, lambda area: area > 5000, connectivity=4)


def below_otsu(grey: np.ndarray) -> np.ndarray:
    threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return grey <= threshold if grey.min() < grey.max() else np.zeros(grey.shape, bool)

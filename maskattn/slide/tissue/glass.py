"""Estimate the colour of the glass across a slide, and the optical density of everything over it.

Density is measured against the slide's own glass, so that a warm lamp or a tinted slide does not count as stain:
density = log10(glass / pixel), per channel. Where illumination falls off, or stain has leaked from the tissue and fades
over the glass, the glass is followed from its palest area along gentle slopes; an edge of tissue, even pale, is steep.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from maskattn.shapes import Bool, Float, UInt8

__all__ = ["DENSITY_STEP", "FLAT_LEVELS", "StainView", "chroma_of", "glass_colour", "local_variance", "measure_stain"]

# Optical density per level of the 8-bit density planes, and an offset that is the density of the glass until it is
# subtracted: under uneven light, pixels brighter than the glass colour keep their stain. The range exceeds every
# threshold.
DENSITY_STEP = 0.003
_GLASS_DENSITY = 0.09

# The standard deviation of glass within 5 × 5 pixels is below this, in grey levels.
FLAT_LEVELS = 2.5
_BRIGHT = 150
_LEAST_SHARE = 0.005
# The greatest chroma of glass against white. Pale stroma on a slide without glass exceeds it.
_MAX_TINT = 0.075
_WHITE = (250.0, 250.0, 250.0)

_FIELD_UM = 16.0
_STEEP_PER_MM = 0.45
_SEED_CHROMA, _SEED_DENSITY = 0.01, 0.06
_MAX_GLASS_CHROMA, _MAX_GLASS_DENSITY = 0.10, 0.30


@dataclass(frozen=True, eq=False)
class StainView:
    """A view of a slide as optical density over its glass, in steps of :data:`DENSITY_STEP`.

    Attributes:
        chroma_HW: (H, W) uint8, the densest channel minus the palest, which is about 0 for shadows and dust.
        density_HW: (H, W) uint8, the mean of the channels.
        glass_HW: (H, W) bool, True where glass was followed.
        edge_HW: (H, W) bool, True where density changes steeply, as it does at the edge of tissue.
        colour: red, green and blue of the glass, 0 to 255.
    """

    chroma_HW: UInt8[np.ndarray, "H W"]
    density_HW: UInt8[np.ndarray, "H W"]
    glass_HW: Bool[np.ndarray, "H W"]
    edge_HW: Bool[np.ndarray, "H W"]
    colour: tuple[float, float, float]


def measure_stain(rgb_HW3: UInt8[np.ndarray, "H W 3"], px_um: float) -> StainView:
    """Measure a view against its own glass.

    Args:
        rgb_HW3: (H, W, 3) uint8 RGB of the whole slide.
        px_um: µm per pixel.
    """
    colour = glass_colour(rgb_HW3)
    density_HW3 = _density(rgb_HW3, colour)
    field_hw3, glass_hw, edge_hw = _follow_glass(density_HW3, px_um)
    size = (rgb_HW3.shape[1], rgb_HW3.shape[0])
    field_HW3 = cv2.resize(np.rint(field_hw3).astype(np.uint8), size, interpolation=cv2.INTER_LINEAR)
    over_glass_HW3 = cv2.subtract(density_HW3, field_HW3)
    glass_HW, edge_HW = (
        cv2.resize(mask_hw.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        for mask_hw in (glass_hw, edge_hw)
    )
    return StainView(*_chroma_and_mean(over_glass_HW3), glass_HW, edge_HW, colour)


def glass_colour(rgb_HW3: UInt8[np.ndarray, "H W 3"]) -> tuple[float, float, float]:
    """Return the colour of the glass: that of the brightest common flat areas if it could be glass, else white.

    Padding, which is exactly white where nothing was scanned, is ignored.
    """
    brightness_HW = cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2GRAY)
    variance_HW = local_variance(brightness_HW)
    flat_HW = cv2.inRange(variance_HW, -np.inf, FLAT_LEVELS**2) & cv2.inRange(brightness_HW, _BRIGHT, 255)
    flat_HW &= ~(cv2.inRange(brightness_HW, 255, 255) & cv2.inRange(variance_HW, -np.inf, 0.0))
    counts = _histogram(brightness_HW, flat_HW)
    if counts.sum() < _LEAST_SHARE * flat_HW.size:
        return _WHITE
    smooth = np.convolve(counts, np.ones(5), mode="same")
    top = int(np.searchsorted(counts.cumsum(), 0.98 * counts.sum()))
    low = max(_BRIGHT, top - 24)
    mode = low + int(smooth[low : top + 3].argmax())
    near_HW = flat_HW & cv2.inRange(brightness_HW, mode - 3, mode + 3)
    red, green, blue = (_median(_histogram(plane, near_HW)) for plane in cv2.split(rgb_HW3))
    if chroma_of((red, green, blue)) > _MAX_TINT:
        return _WHITE
    return red, green, blue


def chroma_of(colour: tuple[float, float, float]) -> float:
    """Return the chroma of a colour in optical density, against white."""
    return float(np.log10(max(colour) / max(min(colour), 1.0)))


def local_variance(plane_HW: UInt8[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Return the variance within 5 × 5 pixels, in squared grey levels."""
    mean = cv2.boxFilter(plane_HW, cv2.CV_32F, (5, 5), borderType=cv2.BORDER_REPLICATE)
    square = cv2.sqrBoxFilter(plane_HW, cv2.CV_32F, (5, 5), borderType=cv2.BORDER_REPLICATE)
    return cv2.subtract(square, cv2.multiply(mean, mean, dst=mean), dst=square)


def _histogram(plane_HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    counts: np.ndarray = cv2.calcHist([plane_HW], [0], mask_HW, [256], [0, 256]).ravel().astype(np.float64)
    return counts


def _median(counts: np.ndarray) -> float:
    return float(np.searchsorted(counts.cumsum(), 0.5 * counts.sum()))


def _density(rgb_HW3: np.ndarray, colour: tuple[float, float, float]) -> UInt8[np.ndarray, "H W 3"]:
    levels = np.maximum(np.arange(256), 0.5)[:, None]
    density = (np.log10(np.array(colour) / levels) + _GLASS_DENSITY) / DENSITY_STEP
    return cv2.LUT(rgb_HW3, np.clip(np.rint(density), 0, 255).astype(np.uint8)[None])


def _chroma_and_mean(density_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    red, green, blue = cv2.split(density_HW3)
    chroma = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
    mean = cv2.transform(density_HW3, np.full((1, 3), 1 / 3, np.float32))
    return chroma, mean


def _follow_glass(density_HW3: np.ndarray, px_um: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the glass density (h, w, 3), continued under tissue, and masks of glass and edges; at about 16 µm/px."""
    height, width = density_HW3.shape[:2]
    shrink = max(1.0, _FIELD_UM / px_um)
    size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    small_hw3 = cv2.resize(density_HW3, size, interpolation=cv2.INTER_AREA).astype(np.float32) * DENSITY_STEP
    smooth_hw3 = cv2.GaussianBlur(small_hw3, (0, 0), 1.5, borderType=cv2.BORDER_REPLICATE)
    pixel_mm = px_um * width / size[0] / 1000
    steep_hw = _slope(smooth_hw3) > _STEEP_PER_MM * pixel_mm
    chroma_hw, mean_hw = _chroma_and_mean(smooth_hw3)
    mean_hw -= _GLASS_DENSITY
    gentle_hw = ~steep_hw & (chroma_hw < _MAX_GLASS_CHROMA) & (mean_hw < _MAX_GLASS_DENSITY)
    seed_hw = gentle_hw & (chroma_hw < _SEED_CHROMA) & (mean_hw < _SEED_DENSITY)
    glass_hw = _grow(seed_hw, gentle_hw)
    return _continue(small_hw3, glass_hw) / DENSITY_STEP, glass_hw, steep_hw


def _slope(plane_hw3: np.ndarray) -> np.ndarray:
    """Return the change per pixel of the channel that changes most."""
    across, down = (
        cv2.split(cv2.Scharr(plane_hw3, cv2.CV_32F, *axis, scale=1 / 32, borderType=cv2.BORDER_REPLICATE))
        for axis in ((1, 0), (0, 1))
    )
    slopes = [cv2.magnitude(x, y) for x, y in zip(across, down, strict=True)]
    return cv2.max(cv2.max(slopes[0], slopes[1]), slopes[2])


def _grow(seed_hw: np.ndarray, through_hw: np.ndarray) -> np.ndarray:
    """Return the pixels of ``through`` that are connected with a seed by more than a narrow bridge."""
    wide = cv2.erode(through_hw.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1)
    _, labels = cv2.connectedComponents(wide, connectivity=4)
    reached = np.zeros(int(labels.max()) + 1, bool)
    reached[labels[seed_hw]] = True
    reached[0] = False
    grown = cv2.dilate(reached[labels].astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return (grown | seed_hw) & through_hw


def _continue(values_hw3: np.ndarray, known_hw: np.ndarray) -> np.ndarray:
    """Smooth the known values and extrapolate them from coarse to fine; the glass's density if none is known."""
    weight = known_hw.astype(np.float32)
    levels = [(values_hw3 * weight[..., None], weight)]
    while max(levels[-1][1].shape) > 2:
        height, width = levels[-1][1].shape
        size = ((width + 1) // 2, (height + 1) // 2)
        levels.append(tuple(cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in levels[-1]))
    total, weight = levels[-1]
    seen = weight[..., None] > 0
    field = np.where(seen, total / np.maximum(weight, 1e-6)[..., None], np.float32(_GLASS_DENSITY))
    for total, weight in reversed(levels[:-1]):
        size = (weight.shape[1], weight.shape[0])
        coarse = cv2.resize(field, size, interpolation=cv2.INTER_LINEAR).reshape(total.shape)
        # A pixel has full weight only if all of it is known; the rest of its weight comes from the coarser level.
        trust = np.minimum(weight, 1.0)[..., None]
        field = total + (1 - trust) * coarse
    return cv2.GaussianBlur(field, (0, 0), 2.0, borderType=cv2.BORDER_REPLICATE).reshape(values_hw3.shape)

"""Find the stained areas of a slide: strong, pale and grey stain.

Strong stain exceeds Otsu's threshold of the slide's chroma. A slide may also have far paler tissue, such as the areas
of an immunostained section without antigen, so a paler area counts as stained if it has texture or a steep edge to the
glass. Silver and pigment are grey, and count as stained where they have texture.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from maskattn.shapes import Bool, Int
from maskattn.slide.tissue.areas import closed, disc, opened
from maskattn.slide.tissue.glass import DENSITY_STEP, StainView, local_variance

__all__ = ["Stained", "find_stain", "stain_threshold"]

# Chroma in optical density. Dirty glass is below the ceiling; stain is rarely below the floor.
_FLOOR, _CEILING = 0.021, 0.075
_OTSU_CONTRAST = 0.018
_PALE_EVEN, _PALE_TEXTURED = 0.030, 0.018
_GREY, _OPAQUE, _BLACK = 0.05, 0.25, 0.45
# Texture is the standard deviation of the density within 5 × 5 pixels; roughness ignores slopes.
_TEXTURE_OF_PALE, _TEXTURE_OF_GREY, _ROUGH = 0.008, 0.020, 0.024
_TEXTURED_SHARE, _STEEP_SHARE, _BLACK_GLASS_SHARE = 0.3, 0.5, 0.5
_PALE_RADIUS_UM, _GREY_RADIUS_UM, _GREY_GAP_UM, _LEFT_RADIUS_UM = 20.0, 50.0, 20.0, 80.0
_REGROWN_UM = 24.0


@dataclass(frozen=True, eq=False)
class Stained:
    """The stained areas of a slide.

    Attributes:
        stained_HW: (H, W) bool, stained tissue and ink.
        opaque_HW: (H, W) bool, areas that transmit little light, stained or not.
        rough_HW: (H, W) bool, areas with texture, stained or not.
    """

    stained_HW: Bool[np.ndarray, "H W"]
    opaque_HW: Bool[np.ndarray, "H W"]
    rough_HW: Bool[np.ndarray, "H W"]


def find_stain(view: StainView, px_um: float) -> Stained:
    """Find the stained areas.

    Args:
        view: the slide's optical density over its glass.
        px_um: µm per pixel.
    """
    chroma_HW = cv2.medianBlur(view.chroma_HW, 3)
    variance_HW = local_variance(view.density_HW)
    strong_HW = chroma_HW > stain_threshold(np.bincount(chroma_HW.ravel(), minlength=256))
    textured_HW = (chroma_HW > _PALE_TEXTURED / DENSITY_STEP) & _textured(variance_HW, _TEXTURE_OF_PALE)
    pale_HW = _pale(view, chroma_HW, textured_HW, strong_HW, px_um)
    stained_HW = strong_HW | pale_HW | _grey(view, variance_HW, px_um)
    stained_HW |= _black_within(stained_HW, view.density_HW > _BLACK / DENSITY_STEP)
    rough_HW = cv2.blur(cv2.convertScaleAbs(cv2.Laplacian(view.density_HW, cv2.CV_16S)), (5, 5))
    return Stained(
        stained_HW=stained_HW,
        opaque_HW=view.density_HW > _OPAQUE / DENSITY_STEP,
        rough_HW=opened(rough_HW > _ROUGH / DENSITY_STEP, _LEFT_RADIUS_UM / px_um),
    )


def stain_threshold(histogram_256: Int[np.ndarray, " 256"]) -> int:
    """Return Otsu's threshold of a histogram of chroma, clamped to bounds; pixels above it are stained.

    Otsu's method splits every picture in two, even one of only glass or only tissue. If the means of its two classes
    differ by less than 0.018, the slide is of one material, and the threshold is the upper bound: only chroma above it
    is stain. Source: N. Otsu, IEEE Trans. SMC 9(1), 1979.

    Args:
        histogram_256: (256,) pixels per level of chroma, in steps of ``DENSITY_STEP``.
    """
    floor, ceiling = round(_FLOOR / DENSITY_STEP), round(_CEILING / DENSITY_STEP)
    levels = np.arange(256)
    below = histogram_256.cumsum().astype(np.float64)
    above = below[-1] - below
    mass = (histogram_256 * levels).cumsum().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        contrast = (mass[-1] - mass) / above - mass / below
    variance = np.nan_to_num(below * above * contrast**2)
    # Every threshold between two separate classes is equally good, so the middle is taken.
    best = np.flatnonzero(variance == variance.max())
    threshold = int(best[(len(best) - 1) // 2])
    if not contrast[threshold] >= _OTSU_CONTRAST / DENSITY_STEP:
        return ceiling
    return min(max(threshold, floor), ceiling)


def _pale(
    view: StainView, chroma_HW: np.ndarray, textured_HW: np.ndarray, strong_HW: np.ndarray, px_um: float
) -> np.ndarray:
    """Return pale areas, without strong stain, that texture or a steep edge distinguishes from the glass."""
    clear_HW = (chroma_HW > _PALE_EVEN / DENSITY_STEP) | textured_HW
    rest_HW = clear_HW & ~strong_HW
    # The rim of strong stain is also pale, but narrow.
    wide_HW = opened(rest_HW, _PALE_RADIUS_UM / px_um).astype(np.uint8)
    rest_HW &= cv2.dilate(wide_HW, disc(_REGROWN_UM / px_um)) > 0
    count, labels = cv2.connectedComponents(rest_HW.astype(np.uint8), connectivity=8)
    if count == 1:
        return rest_HW
    glass_side_HW = cv2.dilate((~(clear_HW | strong_HW)).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    total, textured, border, steep = (
        np.bincount(labels[where], minlength=count)
        for where in (rest_HW, rest_HW & textured_HW, rest_HW & glass_side_HW, rest_HW & glass_side_HW & view.edge_HW)
    )
    counts = (textured >= _TEXTURED_SHARE * total) | (steep >= _STEEP_SHARE * border)
    counts[0] = False
    return counts[labels]


def _grey(view: StainView, variance_HW: np.ndarray, px_um: float) -> np.ndarray:
    """Return wide, dense, textured areas of any colour; dust and the edges of coverslips are too narrow."""
    dense_HW = view.density_HW > _GREY / DENSITY_STEP
    textured_HW = closed(dense_HW & _textured(variance_HW, _TEXTURE_OF_GREY), _GREY_GAP_UM / px_um)
    return opened(textured_HW, _GREY_RADIUS_UM / px_um) & dense_HW


def _black_within(stained_HW: np.ndarray, black_HW: np.ndarray) -> np.ndarray:
    """Return black pieces that border more on stain than on glass: pigment, or stain too dense to show its colour.

    Pieces at the slide's edge are left out, since they may be padding.
    """
    rest = (black_HW & ~stained_HW).astype(np.uint8)
    count, labels = cv2.connectedComponents(rest, connectivity=8)
    if count == 1:
        return rest > 0
    around = cv2.dilate(labels.astype(np.float32), np.ones((3, 3), np.uint8)).astype(np.int32)
    around[rest > 0] = 0
    border, on_glass = (
        np.bincount(around[where], minlength=count) for where in (around > 0, (around > 0) & ~stained_HW)
    )
    within = on_glass < _BLACK_GLASS_SHARE * border
    edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    within[np.concatenate(edges)] = False
    within[0] = False
    return within[labels]


def _textured(variance_HW: np.ndarray, density: float) -> np.ndarray:
    return variance_HW > (density / DENSITY_STEP) ** 2

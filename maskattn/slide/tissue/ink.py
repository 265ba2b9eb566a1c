"""Find pen marks by their shape and evenness, because pens and stains come in the same colours.

A stroke is long for its width, even in colour, and much of its outline is on glass. A blot is not long, but smaller,
more even still, of a deep colour, and almost entirely surrounded by glass. Areas of the same colours that are large, or
have the texture of tissue, are stain, such as the collagen of a trichrome or the background of a silver stain.
"""

from __future__ import annotations

import cv2
import numpy as np

from maskattn.shapes import Bool, UInt8
from maskattn.slide.tissue.areas import disc

__all__ = ["find_ink"]

_BLACK_VALUE = 60
# Ranges of a pen's colours, lowest and highest, in OpenCV's hue (0 to 179), saturation and value (0 to 255).
_COLOURS = {
    "green": ((35, 40, 0), (95, 255, 255)),
    "blue": ((96, 130, 0), (128, 255, 255)),
    "purple": ((129, 130, 0), (142, 255, 255)),
    "red": ((166, 170, 0), (179, 255, 255)),
    "red, on the other side of 0": ((0, 170, 0), (8, 255, 255)),
    "black": ((0, 0, 0), (179, 255, _BLACK_VALUE)),
}
_LEAST_UM2 = 4_000.0
_LENGTH_PER_WIDTH = 2.2
_PORE_UM2 = 100_000.0
_EVEN_LEVELS = 8.0
_GLASS_SHARE = 0.3
# A stroke a few pixels wide is less even and, if thinner still, has no core; but it is surrounded by glass.
_HAIRLINE_LENGTH, _HAIRLINE_GLASS = 6.0, 0.85
_THIN_UM, _THIN_EVEN_LEVELS, _HAIRLINE_UM = 80.0, 20.0, 45.0
# Limits of a blot. Its chroma, an optical density, is higher than that of most stains.
_BLOT_MOST_UM2, _BLOT_EVEN_LEVELS, _BLOT_GLASS, _BLOT_CHROMA = 5e6, 5.0, 0.9, 0.55
_MARGIN_UM = 24.0
_RING_UM = (24.0, 48.0)


def find_ink(
    rgb_HW3: UInt8[np.ndarray, "H W 3"], stained_HW: Bool[np.ndarray, "H W"], px_um: float
) -> Bool[np.ndarray, "H W"]:
    """Find pen strokes and blots, with a margin of 24 µm.

    Args:
        rgb_HW3: (H, W, 3) uint8 RGB of the slide.
        stained_HW: (H, W) bool, everything that is not glass, strokes included.
        px_um: µm per pixel.
    """
    hsv_HW3 = cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2HSV)
    ink_HW = np.zeros(stained_HW.shape, np.uint8)
    for lowest, highest in _COLOURS.values():
        coloured_HW = cv2.inRange(hsv_HW3, lowest, highest)
        if cv2.countNonZero(coloured_HW) * px_um**2 >= _LEAST_UM2:
            ink_HW |= _inked(coloured_HW, rgb_HW3, stained_HW, px_um)
    return cv2.dilate(ink_HW, disc(_MARGIN_UM / px_um)).astype(bool)


def _inked(
    coloured_HW: np.ndarray, rgb_HW3: np.ndarray, stained_HW: np.ndarray, px_um: float
) -> UInt8[np.ndarray, "H W"]:
    """Return the connected pieces of one colour that are ink."""
    # Single pixels are compression noise, not a pen's stroke.
    coloured_HW = cv2.morphologyEx(coloured_HW, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    coloured_HW = cv2.morphologyEx(coloured_HW, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    inked_HW = np.zeros_like(coloured_HW)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(coloured_HW, connectivity=8)
    room = disc(_RING_UM[1] / px_um).shape[0]
    for label in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] * px_um**2 >= _LEAST_UM2):
        left, top, width, height = (int(side) for side in stats[label, : cv2.CC_STAT_AREA])
        window = (slice(max(0, top - room), top + height + room), slice(max(0, left - room), left + width + room))
        piece_hw = labels[window] == label
        if label and _is_ink(piece_hw, rgb_HW3[window], stained_HW[window], px_um):
            inked_HW[window][piece_hw] = 255
    return inked_HW


def _is_ink(piece_hw: np.ndarray, rgb_hw3: np.ndarray, stained_hw: np.ndarray, px_um: float) -> bool:
    solid = _without_pores(piece_hw, _PORE_UM2 / px_um**2).astype(np.uint8)
    depth_hw = cv2.distanceTransform(np.pad(solid, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    depth = float(depth_hw[piece_hw].max())
    area = int(np.count_nonzero(piece_hw))
    length = area / (2 * depth) ** 2
    is_long = length >= _LENGTH_PER_WIDTH
    if not is_long and area * px_um**2 > _BLOT_MOST_UM2:
        return False
    piece = piece_hw.astype(np.uint8)
    near, far = (cv2.dilate(piece, disc(distance / px_um)) > 0 for distance in _RING_UM)
    ring_hw = far & ~near
    on_glass = int(np.count_nonzero(ring_hw & ~stained_hw)) / max(int(np.count_nonzero(ring_hw)), 1)
    if on_glass < (_GLASS_SHARE if is_long else _BLOT_GLASS):
        return False
    width_um = 2 * depth * px_um
    hairline = length >= _HAIRLINE_LENGTH and on_glass >= _HAIRLINE_GLASS
    if hairline and width_um <= _HAIRLINE_UM:
        return True
    core_hw = piece_hw & (depth_hw >= 0.5 * depth)
    brightness_hw = cv2.cvtColor(np.ascontiguousarray(rgb_hw3), cv2.COLOR_RGB2GRAY)
    spread = max(0.0, float(np.median(_variance_within(brightness_hw, core_hw)[core_hw]))) ** 0.5
    if is_long:
        return spread <= (_THIN_EVEN_LEVELS if hairline and width_um <= _THIN_UM else _EVEN_LEVELS)
    return spread <= _BLOT_EVEN_LEVELS and _is_deep(rgb_hw3[core_hw])


def _is_deep(rgb_N3: np.ndarray) -> bool:
    colour = np.maximum(np.median(rgb_N3, axis=0), 1.0)
    return bool(colour.max() <= _BLACK_VALUE or np.log10(colour.max() / colour.min()) >= _BLOT_CHROMA)


def _without_pores(piece_hw: np.ndarray, most_px: float) -> np.ndarray:
    """Fill the small holes of a piece: a lumen must not make it narrow, but the inside of a ring around tissue must."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(np.pad(~piece_hw, 1, constant_values=True).astype(np.uint8))
    pore = stats[:, cv2.CC_STAT_AREA] < most_px
    pore[[0, labels[0, 0]]] = True, False  # the piece itself, and its surroundings
    return pore[labels[1:-1, 1:-1]]


def _variance_within(plane_hw: np.ndarray, mask_hw: np.ndarray) -> np.ndarray:
    """Return the variance within 7 × 7 pixels over the mask's pixels only."""
    weight = mask_hw.astype(np.float32)
    plane = plane_hw.astype(np.float32) * weight
    share, mean, square = (cv2.blur(one, (7, 7)) for one in (weight, plane, plane * plane))
    share = np.maximum(share, 1e-6)
    return square / share - (mean / share) ** 2

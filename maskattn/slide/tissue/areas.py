"""Morphology of masks: closing, opening and dropping small pieces, with sizes in pixels."""

from __future__ import annotations

import cv2
import numpy as np

from maskattn.shapes import Bool

__all__ = ["closed", "disc", "opened", "without_pieces_below"]


def disc(radius_px: float) -> np.ndarray:
    """Return a round structuring element, at least 3 × 3."""
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def closed(mask_HW: Bool[np.ndarray, "H W"], radius_px: float) -> Bool[np.ndarray, "H W"]:
    """Close gaps narrower than a disc; the mask is continued beyond the slide's edge."""
    return _morphed(mask_HW, cv2.MORPH_CLOSE, radius_px)


def opened(mask_HW: Bool[np.ndarray, "H W"], radius_px: float) -> Bool[np.ndarray, "H W"]:
    """Drop what is narrower than a disc; the mask is continued beyond the slide's edge."""
    return _morphed(mask_HW, cv2.MORPH_OPEN, radius_px)


def _morphed(mask_HW: np.ndarray, operation: int, radius_px: float) -> np.ndarray:
    element = disc(radius_px)
    pad = element.shape[0] // 2
    padded = cv2.copyMakeBorder(mask_HW.astype(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    morphed = cv2.morphologyEx(padded, operation, element)
    return morphed[pad : pad + mask_HW.shape[0], pad : pad + mask_HW.shape[1]].astype(bool)


def without_pieces_below(mask_HW: Bool[np.ndarray, "H W"], least_px: float) -> Bool[np.ndarray, "H W"]:
    """Return the mask without its connected components of fewer than ``least_px`` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    stays = stats[:, cv2.CC_STAT_AREA] >= least_px
    stays[0] = False
    return stays[labels]

"""Resampling by area, in blocks of bounded memory, on a white ground."""

from __future__ import annotations

import math

import cv2
import numpy as np

__all__ = ["blocks", "floor_near", "on_white", "resample"]

# OpenCV warps sides below 32,768 px only.
_LONGEST_SIDE_PX = 16_384


def floor_near(position: float) -> int:
    """Floor that takes a position within rounding of a whole pixel as that pixel."""
    nearest = round(position)
    return nearest if abs(position - nearest) < 1e-6 else math.floor(position)


def blocks(out_px: tuple[int, int], scale_x: float, scale_y: float, most_px: int) -> list[tuple[int, int, int, int]]:
    """Cut an output of ``out_px`` into (left, top, right, bottom) whose sources hold at most most_px pixels."""
    source = out_px[0] * scale_x, out_px[1] * scale_y
    if source[0] * source[1] <= most_px and max(source) <= _LONGEST_SIDE_PX:
        return [(0, 0, *out_px)]
    side = most_px**0.5
    step_x, step_y = max(1, int(side / scale_x)), max(1, int(side / scale_y))
    return [
        (left, top, min(left + step_x, out_px[0]), min(top + step_y, out_px[1]))
        for top in range(0, out_px[1], step_y)
        for left in range(0, out_px[0], step_x)
    ]


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Lay (H, W, 4) RGBA on white: (H, W, 3) RGB; what has no alpha stays as it is."""
    if rgba.shape[2] == 3:
        return rgba
    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return rgb
    weight = alpha[..., None].astype(np.uint16)
    blended: np.ndarray = ((rgb * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
    return blended


def resample(
    rgb: np.ndarray, offset: tuple[float, float], extent: tuple[float, float], out_px: tuple[int, int]
) -> np.ndarray:
    """Resample by area the rectangle at ``offset`` of ``extent`` (x, y; pixels of ``rgb``) to ``out_px``."""
    whole = (max(1, round(extent[0])), max(1, round(extent[1])))
    if any(abs(o) > 1e-3 for o in offset) or any(abs(e - w) > 1e-3 for e, w in zip(extent, whole, strict=True)):
        # Shift by less than a pixel onto whole pixels first: area resampling starts at a pixel's edge.
        scale = extent[0] / whole[0], extent[1] / whole[1]
        shift = [
            [scale[0], 0.0, offset[0] + 0.5 * scale[0] - 0.5],
            [0.0, scale[1], offset[1] + 0.5 * scale[1] - 0.5],
        ]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        rgb = cv2.warpAffine(rgb, np.array(shift), whole, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    if whole == out_px:
        return rgb[: whole[1], : whole[0]]
    shrinks = whole[0] >= out_px[0] and whole[1] >= out_px[1]
    resized: np.ndarray = cv2.resize(
        rgb[: whole[1], : whole[0]], out_px, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized

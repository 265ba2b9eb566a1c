"""Area resampling of RGB images in blocks of bounded memory, on a white background."""

from __future__ import annotations

import math

import cv2
import numpy as np

__all__ = ["blocks", "floor_near", "on_white", "resample"]

# OpenCV warps only images with sides below 32,768 px.
_LONGEST_SIDE_PX = 16_384


def floor_near(position: float) -> int:
    """Return the floor of a position; a position within 1e-6 of an integer counts as that integer."""
    nearest = round(position)
    return nearest if abs(position - nearest) < 1e-6 else math.floor(position)


def blocks(out_px: tuple[int, int], scale_x: float, scale_y: float, most_px: int) -> list[tuple[int, int, int, int]]:
    """Cut an output of ``out_px`` into (left, top, right, bottom) blocks of at most ``most_px`` source pixels each."""
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
    """Blend (H, W, 4) RGBA onto white and return (H, W, 3) RGB; an image without alpha is returned unchanged."""
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
    """Resample the rectangle at ``offset`` of size ``extent`` (x, y in pixels of ``rgb``) to ``out_px`` (x, y).

    Shrinking resamples by area, enlarging bilinearly.
    """
    size = (max(1, round(extent[0])), max(1, round(extent[1])))
    if any(abs(o) > 1e-3 for o in offset) or any(abs(e - s) > 1e-3 for e, s in zip(extent, size, strict=True)):
        # Align with the pixel grid first, since area resampling starts at a pixel's edge.
        scale = extent[0] / size[0], extent[1] / size[1]
        shift = [
            [scale[0], 0.0, offset[0] + 0.5 * scale[0] - 0.5],
            [0.0, scale[1], offset[1] + 0.5 * scale[1] - 0.5],
        ]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        rgb = cv2.warpAffine(rgb, np.array(shift), size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    if size == out_px:
        return rgb[: size[1], : size[0]]
    shrinks = size[0] >= out_px[0] and size[1] >= out_px[1]
    resized: np.ndarray = cv2.resize(
        rgb[: size[1], : size[0]], out_px, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized

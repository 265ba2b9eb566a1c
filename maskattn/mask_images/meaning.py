"""Interpretation of a mask image: tissue by labels, by colour other than black, by alpha, or by a threshold.

Labels are integers, of which 0 is background. If a file cannot hold labels (JPEG, edges smoothed by an export), the
mask must have two values and is thresholded halfway between them; a lossy file with other values is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskattn.errors import SlideError
from maskattn.mask_images.decoding import MaskImage
from maskattn.shapes import Bool, Shaped

__all__ = ["tissue_of"]

# Ringing stays within a JPEG block: 8 px, or 16 px if chroma is subsampled.
_REACH_PX, _LOSSY_REACH_PX = 8, 16
# A mask of two values with smooth edges has many shades between them; a file with fewer holds labels.
_LEAST_SHADES = 16
_MANY_LABELS = 64
_LEAST_CONTRAST = 128
_STRAY_SHARE = 0.05
_DRIFT = 6


def tissue_of(
    image: MaskImage, name: str, tissue_values: Sequence[int] | None = None
) -> tuple[Bool[np.ndarray, "H W"], list[str]]:
    """Return the tissue pixels (H, W), and notes for the user on the interpretation.

    Args:
        image: the decoded mask.
        name: its name in messages.
        tissue_values: labels that are tissue; by default every label but 0, every colour but black, and everything that
            is not transparent.

    Raises:
        SlideError: labels are requested from a mask without labels, the mask is lossy and does not have two values, or
            its numbers are neither labels nor shares.
    """
    notes = list(image.notes)
    if tissue_values is None:
        plane, more = _shown(image)
        mask, last = _by_default(plane, image.lossy, name)
        return mask, notes + more + last
    plane = _labels(image, name)
    if image.lossy:
        plane = np.where(_above_half(plane, image.lossy, name), 255, 0)
    elif plane.dtype.kind == "f" and (plane[np.isfinite(plane)] % 1 != 0).any():
        raise SlideError(
            f"--mask-value names labels, which are integers, got a mask of fractions in '{name}'; leave it out, and "
            "shares of 0.5 and more are tissue"
        )
    mask = np.isin(plane, np.asarray(tissue_values))
    if not mask.any():
        found = np.unique(plane)
        wanted = ", ".join(map(str, tissue_values))
        present = ", ".join(f"{value:g}" for value in found[:10]) + (" and more" if len(found) > 10 else "")
        notes.append(f"the mask holds none of the tissue values {wanted}; it holds {present}")
    return mask, notes


def _labels(image: MaskImage, name: str) -> Shaped[np.ndarray, "H W"]:
    """Return the plane that holds the labels."""
    if image.alpha_HW is not None and image.alpha_HW.min() != image.alpha_HW.max():
        raise SlideError(
            f"--mask-value names labels, got a mask with transparency in '{name}'; leave it out, or save the labels as "
            "a grey PNG without transparency"
        )
    if image.samples.ndim == 2:
        return image.samples
    used = [channel for channel in range(3) if image.samples[..., channel].any()]
    grey = all(np.array_equal(image.samples[..., 0], image.samples[..., channel]) for channel in (1, 2))
    if not grey and len(used) > 1:
        raise SlideError(
            f"--mask-value names labels, got a mask in colours in '{name}'; leave it out, and every colour but black "
            "is tissue, or save the labels as a grey PNG"
        )
    return image.samples[..., used[0] if used else 0]


def _shown(image: MaskImage) -> tuple[np.ndarray, list[str]]:
    """Return one plane that is 0 where the mask shows background, and notes."""
    alpha_HW, samples, notes = image.alpha_HW, image.samples, []
    if image.palette_N4 is not None:
        used, _ = _histogram(samples)
        if (image.palette_N4[used, 3] == 0).any():
            alpha_HW, samples = image.palette_N4[samples, 3], image.palette_N4[samples, :3]
        else:
            black = [int(index) for index in used if not image.palette_N4[index, :3].any()]
            if black and black[0] != 0 and used[0] == 0:
                notes.append(
                    f"the mask's index 0 counts as background although index {black[0]} is the black one; if that is "
                    f"wrong, name the indices that are tissue: --mask-value 0"
                )
    plane = samples if samples.ndim == 2 else samples.max(axis=2)
    if alpha_HW is None or (alpha_HW.min() == alpha_HW.max() and alpha_HW.max() > 0):
        return plane, notes
    visible = alpha_HW > 0
    if not visible.any():
        return np.zeros_like(plane), [*notes, "every pixel of the mask is transparent"]
    black = (plane == 0) & visible
    if black.any() and not black[visible].all():
        notes.append("the mask has transparent and black areas; both count as background")
        return np.where(visible, plane, 0), notes
    return alpha_HW, notes


def _by_default(plane: np.ndarray, lossy: str, name: str) -> tuple[np.ndarray, list[str]]:
    if plane.dtype.kind == "b":
        return plane, []
    notes = []
    if plane.dtype.kind == "f":
        numbers = np.isfinite(plane)
        if not numbers.all():
            notes.append(f"{(~numbers).mean():.2%} of the mask is NaN or infinite and counts as background")
            plane = np.where(numbers, plane, 0)
        if (plane % 1 != 0).any():
            return _shares(plane, name), [*notes, "the mask's fractions were taken as shares of tissue, cut at a half"]
    if lossy:
        return _above_half(plane, lossy, name), [f"the mask is lossy ({lossy}); it was cut at half of its range"]
    values, _ = _histogram(plane)
    if len(values) >= _LEAST_SHADES + 2 and _is_two_valued(plane, _REACH_PX):
        return plane > _half(plane), ["the mask's edges are smooth; it was cut at half of its range"]
    if values[0] < 0:
        notes.append(
            f"the mask holds values below 0 ({values[0]:g}), which count as tissue like every value but 0; "
            "--mask-value names those that are"
        )
    if len(values) > _MANY_LABELS:
        notes.append(
            f"the mask holds {len(values):,} different values, and each but 0 counts as tissue; if it is a picture or "
            "a probability map, cut it at a value first"
        )
    return plane != 0, notes


def _shares(plane: np.ndarray, name: str) -> np.ndarray:
    low, high = float(plane.min()), float(plane.max())
    if low < 0 or high > 1:
        raise SlideError(
            "a mask of fractions must hold shares of tissue between 0 and 1, got values from "
            f"{low:g} to {high:g} in '{name}'; save labels as integers"
        )
    return plane >= 0.5


def _above_half(plane: np.ndarray, lossy: str, name: str) -> np.ndarray:
    """Threshold a lossy mask of two values halfway between them.

    Raises:
        SlideError: it has other values, too, or the two are too close together.
    """
    if plane.max() == 0:
        return plane > 0
    low, high = _ends(plane)
    # JPEG decodes flat blocks to a single value, so that even a label close to 0 is detected; those of WebP drift.
    drift = 0 if lossy == "JPEG" else _DRIFT
    if high - low < _LEAST_CONTRAST or not _is_two_valued(plane, _LOSSY_REACH_PX, drift):
        raise SlideError(
            f"a lossy mask ({lossy}) must be black and white, got other values, too, which the compression blurs, in "
            f"'{name}'; save the mask as a PNG"
        )
    return plane > _half(plane)


def _histogram(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values, ascending, and the number of pixels with each."""
    if plane.dtype.kind != "u" or plane.dtype.itemsize > 2:
        return np.unique(plane, return_counts=True)
    counts = np.zeros(1 << (8 * plane.dtype.itemsize), np.int64)
    for strip in np.array_split(plane, max(1, plane.size >> 22)):  # bincount takes 8 bytes for each value
        counts += np.bincount(strip.ravel(), minlength=len(counts))
    values = np.flatnonzero(counts)
    return values, counts[values]


def _ends(plane: np.ndarray) -> tuple[float, float]:
    """Return the most frequent values of the lower and the upper half of the range; 0 if the lower half is empty."""
    values, counts = _histogram(plane)
    upper = values >= values[-1] / 2
    low = float(values[~upper][counts[~upper].argmax()]) if not upper.all() else 0.0
    return low, float(values[upper][counts[upper].argmax()])


def _half(plane: np.ndarray) -> float:
    return sum(_ends(plane)) / 2


def _is_two_valued(plane: np.ndarray, reach_px: int, drift: int = 0) -> bool:
    """Return whether most pixels have one of two values, within ``drift``, and all others are near their border."""
    import cv2

    if plane.min() < 0:
        return False
    low, high = _ends(plane)
    at_low, at_high = ((plane >= end - drift) & (plane <= end + drift) for end in (low, high))
    others = ~(at_low | at_high)
    count = int(np.count_nonzero(others))
    if count == 0:
        return True
    if count > plane.size / 2 or high - low < _LEAST_CONTRAST:
        return False
    window = np.ones((2 * reach_px + 1, 2 * reach_px + 1), np.uint8)
    meet = cv2.dilate(at_low.astype(np.uint8), window) & cv2.dilate(at_high.astype(np.uint8), window)
    return bool(np.count_nonzero(others & (meet == 0)) <= _STRAY_SHARE * count)

"""Check that a slide is a stained section scanned in bright field, as the rest of the package assumes.

Stain darkens bright glass. In dark field and fluorescence the background is dark and tissue is bright, so models of
stained sections do not apply; and a label mask that was given in place of its slide is not a scan.
"""

from __future__ import annotations

import os

import cv2
import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import UInt8
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue.glass import FLAT_LEVELS, local_variance

__all__ = ["refuse_other_than_bright_field", "require_bright_field"]

_THUMBNAIL_PX = 512
# If the coarsest level is larger than this, reading all of it takes too long.
_MAX_LEVEL_PX = 64 << 20
_DARK, _BRIGHT = 60, 150
_DARK_SHARE = 0.5
_GLASS_SHARE = 0.05
# At least a hundredth of a bright-field scan is at least this bright.
_DIM = 110
# A scan within padding fills its bounding rectangle; cells on a dark background do not.
_RECTANGLE_SHARE = 0.9
_MAX_LABELS, _LABEL_SHARE, _LABEL_VALUE = 8, 0.8, 64


def require_bright_field(reader: SlideReader) -> None:
    """Refuse a slide that was not scanned in bright field, if its thumbnail can be read and is quick to read.

    Raises:
        SlideError: the background is dark, or the picture is a label mask.
    """
    width, height = reader.info.level_dimensions[-1]
    if width * height > _MAX_LEVEL_PX:
        return
    try:
        rgb_HW3 = reader.thumbnail(_THUMBNAIL_PX)
    except SlideError:  # damaged: reading its tiles reports it
        return
    refuse_other_than_bright_field(rgb_HW3, reader.info.path)


def refuse_other_than_bright_field(
    rgb_HW3: UInt8[np.ndarray, "H W 3"], path: str | os.PathLike[str], force: bool = False
) -> list[str]:
    """Refuse a slide that was not scanned in bright field.

    Args:
        rgb_HW3: (H, W, 3) uint8 RGB of the whole slide.
        path: the slide's file, for the message.
        force: return a note instead of raising.

    Returns:
        The notes; empty if the slide passes.

    Raises:
        SlideError: the background is dark, or the picture is a label mask.
    """
    labels = _labels(rgb_HW3)
    if labels:
        values = ", ".join(str(value) for value in labels)
        what = f"flat grey areas of the values {values} alone", "as a label mask has them"
        remedy = "name the slide itself and give the mask with --mask"
    elif _is_dark(rgb_HW3):
        what = "a dark background", "as dark field and fluorescence have it"
        remedy = "give a bright-field scan, for models of stained sections do not apply to this one"
    else:
        return []
    if force:
        return [f"the slide shows {what[0]}, {what[1]}, and was gone on with by force"]
    raise SlideError(
        f"a slide must be a stained section scanned in bright field, got {what[0]} in {path}, {what[1]}; {remedy}, or "
        "go on with --force"
    )


def _labels(rgb_HW3: np.ndarray) -> list[int]:
    """Return the values of a label mask in ascending order; empty if the picture is not a label mask."""
    red, green, blue = cv2.split(rgb_HW3)
    if not (np.array_equal(red, green) and np.array_equal(green, blue)):
        return []
    element = np.ones((3, 3), np.uint8)
    flat = cv2.dilate(red, element) == cv2.erode(red, element)
    counts = np.bincount(red[flat], minlength=256)
    values = np.flatnonzero(counts)
    is_mask = flat.mean() >= _LABEL_SHARE and 2 <= len(values) <= _MAX_LABELS and values[0] < _LABEL_VALUE
    return [int(value) for value in values] if is_mask else []


def _is_dark(rgb_HW3: np.ndarray) -> bool:
    brightness = cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2GRAY)
    if np.count_nonzero(brightness >= _DIM) < 0.01 * brightness.size:
        return True
    if np.count_nonzero(brightness < _DARK) < _DARK_SHARE * brightness.size:
        return False
    glass = (brightness >= _BRIGHT) & (local_variance(brightness) < FLAT_LEVELS**2)
    if np.count_nonzero(glass) >= _GLASS_SHARE * brightness.size:
        return False
    # Black may be padding around a scan without glass: then the other pixels are bright, and fill a rectangle.
    shown = brightness > 0
    _, _, width, height = cv2.boundingRect(shown.astype(np.uint8))
    fills = np.count_nonzero(shown) >= _RECTANGLE_SHARE * width * height
    return not (fills and float(np.median(brightness[shown])) >= _DIM)

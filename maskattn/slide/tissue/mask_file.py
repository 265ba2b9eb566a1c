"""The user's own mask of a slide: an image file, read to one plane of labels and then to tissue.

Of a pyramid the coarsest level is read that is still fine enough for tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from maskattn.errors import SlideError
from maskattn.mask_images.decoding import read_mask_image
from maskattn.mask_images.meaning import tissue_of
from maskattn.shapes import UInt8
from maskattn.slide.outlines.json_features import is_json
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.tissue.mask import TissueMask, mask_of_slide
from maskattn.slide.tissue.outlined import load_outlines

__all__ = ["load_mask"]

# A level of a pyramid at this spacing has several pixels in the smallest tokens that are used (8 µm).
_FINE_ENOUGH_UM = 4.0
_VIEW_PX = 512
# A slide whose coarsest level is larger is not read just to see whether the mask is inverted.
_MAX_VIEWED_PX = 32 << 20
_STAINED_SATURATION, _STAINED_VALUE = 25, 160
_INVERTED = "the mask's tissue is glass on the slide, and what lies outside is stained"


def load_mask(
    path: str | os.PathLike[str],
    info: SlideInfo,
    tissue_values: Sequence[int] | None = None,
    *,
    tissue_classes: Sequence[str] | None = None,
    reader: SlideReader | None = None,
) -> TissueMask:
    """Read the user's own mask: PNG, TIFF (pyramids too), .npy or whatever else Pillow opens, at any spacing.

    GeoJSON outlines in level-0 pixels are read too (:mod:`maskattn.slide.outlines.reading`); what follows is of images.
    The mask must cover the whole slide: its sides must be in the slide's proportion, within 1 % or one mask pixel.
    Of a palette image the indices are the labels. Of a colour image every colour but black is tissue, and where alpha
    varies, what it hides is not. A lossy mask, or one with smooth edges, is cut at half of its range.

    Args:
        path: the mask file.
        info: the slide that it belongs to.
        tissue_values: the label values that are tissue; by default every value but 0.
        tissue_classes: of outlines, the classes that are tissue; by default all but QuPath's "Ignore*".
        reader: of the slide, to see whether the mask looks inverted; None does not look.

    Raises:
        SlideError: the file is missing, is no image or is too large, or is lossy and holds more than two values; or
            the mask is not in the slide's proportion, or has no labels to look ``tissue_values`` up in, or no
            ``tissue_classes``.
    """
    if is_json(path):
        return _of_outlines(path, info, tissue_values, tissue_classes, reader)
    if tissue_classes is not None:
        raise SlideError(
            f"--mask-class names classes of GeoJSON outlines, got {', '.join(map(repr, tissue_classes))} and the image "
            f"'{path}'; leave it out, or name labels with --mask-value"
        )

    def check_size(width: int, height: int) -> None:
        if not _in_proportion((width, height), (info.width_px, info.height_px)):
            raise SlideError(
                "a mask must cover its whole slide, so be in its proportion within 1 % or one mask pixel, got a mask "
                f"of {width} × {height} px in '{path}' for a slide of {info.width_px} × {info.height_px} px; export "
                "the mask for the whole slide, at any spacing"
            )

    image = read_mask_image(path, lambda width: info.width_px * info.spacing_um / width <= _FINE_ENOUGH_UM, check_size)
    mask, notes = tissue_of(image, str(path), tissue_values)
    if not mask.any():
        notes.append(f"the mask file {path} holds no tissue")
    elif reader is not None and _looks_inverted(mask, reader):
        notes.append(f"{_INVERTED}: the mask looks inverted; --mask-value names the values that are tissue, 0 too")
    return mask_of_slide(mask, info, "file", notes)


def _of_outlines(
    path: str | os.PathLike[str],
    info: SlideInfo,
    tissue_values: Sequence[int] | None,
    tissue_classes: Sequence[str] | None,
    reader: SlideReader | None,
) -> TissueMask:
    if tissue_values is not None:
        raise SlideError(
            f"--mask-value names labels of an image, got {', '.join(map(str, tissue_values))} and the outlines "
            f"'{path}'; leave it out, or name classes with --mask-class"
        )
    tissue = load_outlines(path, info, tissue_classes)
    if reader is not None and _looks_inverted(tissue.mask_HW, reader):
        note = f"{_INVERTED}: the outlines may be of another slide, or not in pixels of level 0"
        tissue = replace(tissue, notes=(*tissue.notes, note))
    return tissue


def _looks_inverted(mask_HW: np.ndarray, reader: SlideReader) -> bool:
    """Whether hardly anything inside the mask is stained, and most outside is."""
    width, height = reader.info.level_dimensions[-1]
    if mask_HW.all() or width * height > _MAX_VIEWED_PX:
        return False
    try:
        view_YX3: UInt8[np.ndarray, "Y X 3"] = reader.thumbnail(_VIEW_PX)
    except SlideError:  # damaged there; who reads its tiles says so
        return False
    _, saturation, value = cv2.split(cv2.cvtColor(view_YX3, cv2.COLOR_RGB2HSV))
    stained = (cv2.medianBlur(saturation, 3) > _STAINED_SATURATION) | (value < _STAINED_VALUE)
    inside = cv2.resize(mask_HW.astype(np.uint8), stained.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    if inside.all() or not inside.any():
        return False
    return bool(stained[inside].mean() < 0.1 and stained[~inside].mean() > 0.5)


def _in_proportion(mask_px: tuple[int, int], slide_px: tuple[int, int]) -> bool:
    """Whether a side of the mask is what its other side calls for, within 1 % or one pixel."""
    (width, height), (slide_width, slide_height) = mask_px, slide_px
    height_off = abs(width * slide_height / slide_width - height)
    width_off = abs(height * slide_width / slide_height - width)
    return height_off <= max(1.0, 0.01 * height) or width_off <= max(1.0, 0.01 * width)

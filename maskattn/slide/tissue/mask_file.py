"""Read the user's own mask of a slide: an image of labels, or outlines.

In a pyramid, the coarsest level that is fine enough for tokens is read.
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
    """Read the user's own mask: GeoJSON outlines, PNG, TIFF, .npy or any other image that Pillow opens.

    Outlines are in level-0 pixels (:mod:`maskattn.slide.outlines.reading`). An image may have any spacing, but must
    cover the whole slide: its aspect ratio must be the slide's, within 1 % or one mask pixel. In a palette image the
    indices are the labels. In a colour image every colour but black is tissue, except where varying alpha is
    transparent. A lossy mask, or one with smooth edges, is thresholded at half of its range.

    Args:
        path: the mask file.
        info: the slide that the mask belongs to.
        tissue_values: the label values that are tissue; None takes every value but 0.
        tissue_classes: the classes of outlines that are tissue; None takes all but QuPath's "Ignore*".
        reader: the slide's reader, to check whether the mask looks inverted; None skips this check.

    Raises:
        SlideError: the file is missing, is not a mask, is too large, or is lossy with more than two values; the mask
            has another aspect ratio than the slide; or ``tissue_values`` or ``tissue_classes`` do not apply to it.
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
    """Return whether hardly anything inside the mask is stained, and most of the outside is."""
    width, height = reader.info.level_dimensions[-1]
    if mask_HW.all() or width * height > _MAX_VIEWED_PX:
        return False
    try:
        view_YX3: UInt8[np.ndarray, "Y X 3"] = reader.thumbnail(_VIEW_PX)
    except SlideError:  # damaged: reading its tiles reports it
        return False
    _, saturation, value = cv2.split(cv2.cvtColor(view_YX3, cv2.COLOR_RGB2HSV))
    stained = (cv2.medianBlur(saturation, 3) > _STAINED_SATURATION) | (value < _STAINED_VALUE)
    inside = cv2.resize(mask_HW.astype(np.uint8), stained.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    if inside.all() or not inside.any():
        return False
    return bool(stained[inside].mean() < 0.1 and stained[~inside].mean() > 0.5)


def _in_proportion(mask_px: tuple[int, int], slide_px: tuple[int, int]) -> bool:
    """Return whether the mask has the slide's aspect ratio, to within 1 % or one pixel of a side."""
    (width, height), (slide_width, slide_height) = mask_px, slide_px
    height_off = abs(width * slide_height / slide_width - height)
    width_off = abs(height * slide_width / slide_height - width)
    return height_off <= max(1.0, 0.01 * height) or width_off <= max(1.0, 0.01 * width)

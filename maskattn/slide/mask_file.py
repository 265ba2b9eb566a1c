"""The user's own mask of a slide: an image file, read to one plane of labels and then to tissue.

Of a pyramid the coarsest level is read that is still fine enough for tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from maskattn.errors import SlideError
from maskattn.shapes import Shaped
from maskattn.slide.reader import SlideInfo
from maskattn.slide.tissue_mask import TissueMask, mask_of_slide

__all__ = ["load_mask", "read_mask_plane"]

_MAX_PX = 1 << 28
# A level of a pyramid at this spacing has several pixels in the smallest tokens that are used (8 µm).
_FINE_ENOUGH_UM = 4.0


def load_mask(
    path: str | os.PathLike[str], info: SlideInfo, tissue_values: tuple[int, ...] | list[int] | None = None
) -> TissueMask:
    """Read the user's own mask: PNG, TIFF (pyramids too) or whatever else Pillow opens, at any spacing.

    The mask must cover the whole slide: its sides must be in the slide's proportion, within 1 % or one mask pixel.
    Of a colour image the first channel counts; of a palette image, the indices.

    Args:
        path: the mask file.
        info: the slide that it belongs to.
        tissue_values: the label values that are tissue; by default every value but 0.

    Raises:
        SlideError: the file is missing or cannot be read, or the mask is not in the slide's proportion.
    """
    plane = read_mask_plane(path, info)
    height, width = plane.shape
    if not _in_proportion((width, height), (info.width_px, info.height_px)):
        raise SlideError(
            "a mask must cover its whole slide, so be in its proportion within 1 % or one mask pixel, got a mask of "
            f"{width} × {height} px in '{path}' for a slide of {info.width_px} × {info.height_px} px; export the mask "
            "for the whole slide, at any spacing"
        )
    notes = []
    if tissue_values is None:
        mask = plane != 0
    else:
        mask = np.isin(plane, np.asarray(tissue_values))
        if not mask.any():
            found = ", ".join(str(value) for value in np.unique(plane)[:10])
            wanted = ", ".join(str(value) for value in tissue_values)
            notes.append(f"the mask holds none of the tissue values {wanted}; it holds {found}")
    if not mask.any():
        notes.append(f"the mask file {path} holds no tissue")
    return mask_of_slide(mask, info, "file", notes)


def read_mask_plane(path: str | os.PathLike[str], info: SlideInfo) -> Shaped[np.ndarray, "H W"]:
    """Read a mask's labels, (H, W): the first channel of a colour image, the indices of a palette image.

    Raises:
        SlideError: the file is missing, is not an image, cannot be decoded, or is too large to decode at once.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise SlideError(f"a mask must be an image file, got path='{path}', which is {what}; check the path")
    try:
        with _large_images_allowed(), Image.open(path) as image:
            image.seek(_level(image, info))
            width, height = image.size
            if width * height > _MAX_PX:
                raise SlideError(
                    f"a mask may have up to {_MAX_PX:,} pixels, got {width} × {height} in '{path}'; save it at a "
                    "coarser spacing (2 to 8 µm per pixel serves well), or as a pyramidal TIFF"
                )
            plane = np.asarray(image)
    except SlideError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:  # what Pillow's decoders raise
        raise SlideError(
            f"a mask must be an image that Pillow reads, got path='{path}', which fails with '{error}'; "
            "save it as a PNG, or a TIFF without exotic compression"
        ) from error
    return plane if plane.ndim == 2 else plane[..., 0]


def _level(image: Image.Image, info: SlideInfo) -> int:
    """The frame to read: of those with the first one's proportion, the coarsest that is fine enough."""
    frames = getattr(image, "n_frames", 1)
    first_width, first_height = image.size
    best, best_width = 0, first_width
    for frame in range(1, frames):
        image.seek(frame)
        width, height = image.size
        same_view = abs(first_height * width / first_width - height) <= 1.0 and width <= first_width
        if same_view and width < best_width and info.width_px * info.spacing_um / width <= _FINE_ENOUGH_UM:
            best, best_width = frame, width
    return best


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    """Lift Pillow's guard against huge images: it is meant for uploads, and the size is checked here."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _in_proportion(mask_px: tuple[int, int], slide_px: tuple[int, int]) -> bool:
    """Whether a side of the mask is what its other side calls for, within 1 % or one pixel."""
    (width, height), (slide_width, slide_height) = mask_px, slide_px
    height_off = abs(width * slide_height / slide_width - height)
    width_off = abs(height * slide_width / slide_height - width)
    return height_off <= max(1.0, 0.01 * height) or width_off <= max(1.0, 0.01 * width)

"""Which decoder opens a slide file."""

from __future__ import annotations

from pathlib import Path

import openslide

from maskattn.errors import SlideError
from maskattn.slide.formats.image import SlideImage
from maskattn.slide.formats.openslide_image import OpenSlideImage

__all__ = ["open_image"]


def open_image(path: Path) -> SlideImage:
    """Open a slide file.

    Raises:
        SlideError: the file is missing, is no slide, or nothing here reads it.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise SlideError(f"a slide must be a file, got path='{path}', which is {what}; check the path")
    try:
        return OpenSlideImage(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            f"a slide must be in a format that OpenSlide reads, got path='{path}', which it does not know; "
            "check that the file is complete, or convert it to a tiled pyramidal TIFF"
        ) from error
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(
            f"a slide must open in OpenSlide, got path='{path}', which fails with '{error}'; "
            "check that the file is complete and readable, or convert it to a tiled pyramidal TIFF"
        ) from error

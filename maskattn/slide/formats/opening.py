"""Choose the decoder that opens a slide file, and explain why where none does.

OpenSlide comes first; imagecodecs decodes the tiles of its slides where that gives the same pixels
(:mod:`maskattn.slide.formats.plain_tiles`). tifffile takes the TIFFs that OpenSlide does not open, and those with
content that OpenSlide would miss: levels in SubIFDs, a page per colour, several series. A placeholder's remote file is
opened by those readers that take a file object (:mod:`maskattn.slide.formats.ranged_image`).
"""

from __future__ import annotations

from pathlib import Path

import openslide

from maskattn.errors import SlideError
from maskattn.slide.formats.identify import identify_file, identify_folder, is_tiff
from maskattn.slide.formats.image import NotRead, SlideImage
from maskattn.slide.formats.openslide_image import OpenSlideImage
from maskattn.slide.formats.remedies import remedy_for, said_by
from maskattn.slide.placeholders import is_placeholder

__all__ = ["open_image"]

_RULE = "a slide must be a brightfield image in a format that OpenSlide or tifffile reads"


def open_image(path: Path, series: int | None = None) -> SlideImage:
    """Open a slide file.

    Args:
        path: the slide file.
        series: index of a series in a TIFF that holds several; None takes the largest.

    Raises:
        SlideError: the file is missing, is not a slide, or no decoder reads it; the message says what it is.
        CopyNeeded: a remote file cannot be read in parts; a copy of it can be opened.
        ModuleNotFoundError: the file needs tifffile or imagecodecs, which are not installed.
    """
    try:
        if path.is_dir():
            raise identify_folder(path)
        if not path.is_file():
            raise NotRead("no file", "check the path")
        if is_placeholder(path):
            from maskattn.slide.formats.ranged_image import open_in_parts

            return open_in_parts(path, series)
        return _open(path, series)
    except NotRead as refusal:
        raise SlideError(f"{_RULE}, got path='{path}', which is {said_by(refusal.what)}; {refusal.remedy}") from refusal
    except OSError as error:
        raise SlideError(
            f"a slide must be readable, got path='{path}', which fails with '{said_by(error.strerror or error)}'; "
            "check the disk or the network drive, and who may read the file"
        ) from error


def _open(path: Path, series: int | None) -> SlideImage:
    if is_tiff(path):
        image = _open_in_tifffile_first(path, series)
        if image is not None:
            return image
    elif series:
        raise NotRead(f"no TIFF, but asked for series {series}", "leave --series out: only TIFFs hold several")
    try:
        return _with_plain_tiles(OpenSlideImage(path), path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        reason, cause = "", error
    except openslide.OpenSlideError as error:
        reason, cause = said_by(error), error
    try:
        refusal = identify_file(path, known=bool(reason))
        if refusal is not None:
            raise refusal from cause
        if is_tiff(path):
            return _open_in_tifffile_last(path, series, reason)
    except NotRead as refusal:
        if reason:
            refusal.what += f" (OpenSlide: {reason})"
        raise
    if reason:
        raise SlideError(
            f"a slide must open in OpenSlide, got path='{path}', which fails with '{reason}'; {remedy_for(reason)}"
        ) from cause
    raise NotRead(
        "of a format that neither knows", "check that the file is complete, or convert it to a tiled pyramidal TIFF"
    ) from cause


def _with_plain_tiles(image: OpenSlideImage, path: Path) -> SlideImage:
    try:
        from maskattn.slide.formats.plain_tiles import with_plain_tiles
    except ModuleNotFoundError:  # without tifffile or imagecodecs OpenSlide reads alone
        return image
    return with_plain_tiles(image, path)


def _open_in_tifffile_first(path: Path, series: int | None) -> SlideImage | None:
    """The file in tifffile where OpenSlide would show less of it, or could not decode it; otherwise None."""
    from maskattn.slide.formats.tiff_image import TiffImage
    from maskattn.slide.formats.tiff_series import is_better_in_tifffile

    try:
        if series is None and not is_better_in_tifffile(path):
            return None
        return TiffImage(path, series)
    except NotRead:
        raise
    except Exception:  # tifffile raises errors of many kinds; OpenSlide's words are the better ones
        if series:
            raise NotRead(f"a TIFF whose series {series} tifffile cannot open", "leave --series out") from None
        return None


def _open_in_tifffile_last(path: Path, series: int | None, reason: str) -> SlideImage:
    from maskattn.slide.formats.tiff_image import TiffImage

    try:
        return TiffImage(path, series)
    except NotRead:
        raise
    except Exception as error:  # tifffile raises errors of many kinds
        reasons = " and ".join(f"'{said_by(text)}'" for text in (reason, str(error)) if text)
        raise SlideError(
            f"a slide must open in OpenSlide or tifffile, got path='{path}', which fails with {reasons}; "
            f"{remedy_for(reason or str(error))}"
        ) from error

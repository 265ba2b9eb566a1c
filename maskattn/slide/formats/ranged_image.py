"""Slides in object stores and on web servers whose parts are read where they lie, by readers that take a file object.

Those are tifffile's TIFFs, and DICOM slides. The others that OpenSlide opens go on being copied, because another reader
would report other metadata of the same slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskattn.shapes import UInt8
from maskattn.slide.formats.identify import begins_tiff
from maskattn.slide.formats.image import DecodeError, NotRead, SlideImage
from maskattn.slide.placeholders import placeholders_beside
from maskattn.slide.remote.range_requests import CopyNeeded
from maskattn.slide.remote.ranges import HeldBlocks, RangeFile

__all__ = ["RangedImage", "open_in_parts"]


def open_in_parts(path: Path, series: int | None) -> RangedImage:
    """Open the remote file that a placeholder stands for.

    Args:
        path: the placeholder.
        series: index of a series in a TIFF that holds several; None takes the largest.

    Raises:
        NotRead: it is of a kind that is not read.
        CopyNeeded: it cannot be read in parts.
        StoreStopped: the store does not give them.
    """
    held = HeldBlocks()
    files = [RangeFile(file, held) for file in placeholders_beside(path)]
    try:
        image = _open_dicom(files, path) if _is_dicom(files[0]) else _open_tiff(files[0], path, series)
        for file in files:
            file.check()
            file.keep_held()
    except BaseException as error:
        for file in files:
            file.close()
            if isinstance(error, Exception):
                file.check()
        raise
    return RangedImage(image, files)


class RangedImage:
    """An image that is read in parts; see :class:`maskattn.slide.formats.image.SlideImage`.

    A store that stops answering is an error that ends the slide, and never damage of it.

    Args:
        image: the image as its decoder gives it.
        files: those that it reads.
    """

    decoder: str
    vendor: str | None
    series: tuple[str, ...]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]
    level_tiles: tuple[tuple[int, int], ...]
    properties: dict[str, str]
    associated_images: tuple[str, ...]

    def __init__(self, image: SlideImage, files: Sequence[RangeFile]) -> None:
        self._image, self._files = image, files
        for name in SlideImage.__annotations__:
            setattr(self, name, getattr(image, name))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W C"]:
        """Decode a rectangle of a level, in its own pixels.

        Raises:
            DecodeError: the region cannot be decoded.
            StoreStopped: the store does not give it.
        """
        try:
            pixels: np.ndarray = self._image.read(level, x, y, width, height)
        except DecodeError:
            self._check()
            raise
        self._check()
        return pixels

    def close(self) -> None:
        """Close the files."""
        self._image.close()
        for file in self._files:
            file.close()

    def _check(self) -> None:
        for file in self._files:
            file.check()


def _is_dicom(file: RangeFile) -> bool:
    file.seek(128)
    return file.read(4) == b"DICM"


def _open_dicom(files: Sequence[RangeFile], path: Path) -> SlideImage:
    try:
        from maskattn.slide.formats.dicom_image import DicomImage

        return DicomImage(files)
    except Exception as error:  # wsidicom is not installed, or raises errors of many kinds; OpenSlide opens a copy
        raise CopyNeeded(f"a slide must open in wsidicom to be read in parts, got '{path}' ({error})") from error


def _open_tiff(file: RangeFile, path: Path, series: int | None) -> SlideImage:
    file.seek(0)
    if not begins_tiff(file.read(4)):
        raise CopyNeeded(f"a slide must be a TIFF to be read in parts, got '{path}'")
    from maskattn.slide.formats.tiff_image import TiffImage
    from maskattn.slide.formats.tiff_series import is_better_in_tifffile

    try:
        file.seek(0)
        if series is None and not is_better_in_tifffile(file):
            raise CopyNeeded(f"a slide must be one that tifffile reads to be read in parts, got '{path}'")
        file.seek(0)
        return TiffImage(file, series)
    except (NotRead, CopyNeeded):
        raise
    except Exception as error:  # tifffile raises errors of many kinds; OpenSlide may open what it cannot
        file.check()
        raise CopyNeeded(f"a slide must open in tifffile to be read in parts, got '{path}' ({error})") from error

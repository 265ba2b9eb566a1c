"""Decoding of mask files to their own samples: no mixed colours, no lost bits, and only one level of a pyramid.

Dimension key: (H, W) pixels of the level that was read, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from maskattn.errors import SlideError
from maskattn.mask_images.tiff import TiffMask, read_tiff
from maskattn.shapes import Shaped, UInt8

__all__ = ["MaskImage", "coarsest_level", "read_mask_image"]

LevelChoice: TypeAlias = "Callable[[list[tuple[int, int]]], int]"
"""Chooses the page to read from the (width, height) of all pages."""

_MAX_PX = 1 << 28
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OUTLINES = (  # GeoJSON, and the XML of annotation programs
    "a mask must be an image, got outlines (JSON or XML) in '{path}', which are not read; draw them into an image that "
    "covers the slide (QuPath: LabeledImageServer and writeImage in its script editor; ASAP: its mask conversion)"
)


@dataclass(frozen=True, eq=False)
class MaskImage:
    """A mask as stored in its file.

    Attributes:
        samples: (H, W), labels or the indices of a palette; or (H, W, 3), colours.
        alpha_HW: (H, W), 0 = transparent; None if the file has no alpha channel.
        palette_N4: (N, 4) RGBA of each index; None if there is no palette.
        lossy: the compression that changes values, "JPEG" or "WebP"; empty if they are exact.
        notes: the parts of the file that were ignored, in words.
    """

    samples: Shaped[np.ndarray, "H W ..."]
    alpha_HW: Shaped[np.ndarray, "H W"] | None = None
    palette_N4: UInt8[np.ndarray, "N 4"] | None = None
    lossy: str = ""
    notes: tuple[str, ...] = ()


def read_mask_image(
    path: str | os.PathLike[str],
    is_fine_enough: Callable[[int], bool],
    check_size: Callable[[int, int], None] = lambda width, height: None,
) -> MaskImage:
    """Decode a mask: PNG, TIFF (pyramids, any depth), NumPy's .npy or any other format that Pillow opens.

    Args:
        path: the mask file.
        is_fine_enough: whether a level of this width in pixels is fine enough; the coarsest such level of a pyramid is
            read, or the finest level if there is none.
        check_size: called with the width and height of the level before it is decoded; may raise SlideError.

    Raises:
        SlideError: the file is missing, is not an image, cannot be decoded completely, or is too large.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise SlideError(f"a mask must be an image file, got path='{path}', which is {what}; check the path")
    try:
        image = _decode(path, lambda sizes: _checked_level(path, sizes, is_fine_enough, check_size))
        if 0 in image.samples.shape:
            raise ValueError("no pixels")
        return image
    except SlideError:
        raise
    except MemoryError as error:
        raise _too_large(path, "more than this machine's memory can hold") from error
    # Pillow's plugins raise struct.error, KeyError and others for a broken file.
    except Exception as error:
        raise SlideError(
            f"a mask must be an image that Pillow reads, got path='{path}', which fails with '{error}'; "
            "save it as a PNG, or a TIFF without exotic compression"
        ) from error


def _decode(path: Path, level_of: LevelChoice) -> MaskImage:
    with path.open("rb") as file:
        start = file.read(256)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"{", b"[", b"<")):
        raise SlideError(_OUTLINES.format(path=path))
    if start.startswith(b"\x93NUMPY"):
        return _read_npy(path, level_of)
    if start.startswith(_TIFF_STARTS):
        page = read_tiff(path, level_of)
        if page is not None:
            return _of_tiff(page)
    with _large_images_allowed(), Image.open(path) as image:
        return _read_with_pillow(path, image, start, level_of)


def coarsest_level(sizes: list[tuple[int, int]], is_fine_enough: Callable[[int], bool]) -> int:
    """Return the index of the page to read: the coarsest that is fine enough and has the first page's aspect ratio.

    Args:
        sizes: (width, height) of each page, in px.
        is_fine_enough: whether a page of this width is fine enough.
    """
    first_width, first_height = sizes[0]
    best, best_width = 0, first_width
    for page, (width, height) in enumerate(sizes):
        same_view = abs(first_height * width / first_width - height) <= 1.0
        if same_view and width < best_width and is_fine_enough(width):
            best, best_width = page, width
    return best


def _checked_level(
    path: Path,
    sizes: list[tuple[int, int]],
    is_fine_enough: Callable[[int], bool],
    check_size: Callable[[int, int], None],
) -> int:
    level = coarsest_level(sizes, is_fine_enough)
    width, height = sizes[level]
    if width * height > _MAX_PX:
        raise _too_large(path, f"{width} × {height}")
    check_size(width, height)
    return level


def _too_large(path: Path, what: str) -> SlideError:
    return SlideError(
        f"a mask may have up to {_MAX_PX:,} pixels, got {what} in '{path}'; save it at a coarser spacing (2 to 8 µm "
        "per pixel is sufficient), or as a pyramidal TIFF"
    )


def _read_npy(path: Path, level_of: LevelChoice) -> MaskImage:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 2 or array.dtype.kind not in "buif" or 0 in array.shape:
        raise SlideError(
            f"a mask in a .npy file must be two-dimensional, of numbers or bools, got shape {array.shape} of "
            f"{array.dtype} in '{path}'; save one plane of labels"
        )
    level_of([array.shape[::-1]])
    return MaskImage(np.array(array))


def _of_tiff(page: TiffMask) -> MaskImage:
    samples, alpha_HW, notes = page.samples, None, _note_of_pages(page.equal_pages)
    if samples.ndim == 3:
        channels = samples.shape[2]
        colours = 3 if channels >= 3 else 1
        if page.alpha and channels > colours:
            alpha_HW = samples[..., colours]
        elif channels > colours:
            notes += (
                f"the mask has {channels} channels; only the first {'three were' if colours == 3 else 'was'} read",
            )
        samples = samples[..., 0] if colours == 1 else samples[..., :3]
    return MaskImage(samples, alpha_HW, page.palette_N4, "JPEG" if page.jpeg else "", notes)


def _note_of_pages(equal_pages: int) -> tuple[str, ...]:
    return (f"the mask has {equal_pages} pages of one size; only the first was read",) if equal_pages > 1 else ()


def _read_with_pillow(path: Path, image: Image.Image, start: bytes, level_of: LevelChoice) -> MaskImage:
    sizes = [image.size]
    for frame in range(1, getattr(image, "n_frames", 1)):
        image.seek(frame)
        sizes.append(image.size)
    image.seek(level_of(sizes))
    lossy = "WebP" if start[8:16] == b"WEBPVP8 " else ""
    if image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg":
        lossy = "JPEG"
    notes = _note_of_pages(sizes.count(sizes[0]))
    if image.mode in ("L", "LA", "RGB", "RGBA") and _has_16_bits(image):
        samples, alpha_HW = _read_16_bit_colours(path, np.array(image))
        return MaskImage(samples, alpha_HW, lossy=lossy, notes=notes)
    transparent = image.info.get("transparency")
    if image.mode == "P":
        return MaskImage(np.array(image), None, _palette(image, transparent), lossy, notes)
    samples, alpha_HW = _samples_and_alpha(image)
    if alpha_HW is None and transparent is not None:
        clear = samples == np.array(transparent)
        alpha_HW = np.where(clear if samples.ndim == 2 else clear.all(axis=2), np.uint8(0), np.uint8(255))
    return MaskImage(samples, alpha_HW, None, lossy, notes)


def _samples_and_alpha(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        return np.array(image), None
    if image.mode in ("LA", "La"):
        both = np.array(image.convert("LA"))
        return both[..., 0], both[..., 1]
    if image.mode in ("PA", "RGBA", "RGBa"):
        both = np.array(image.convert("RGBA"))
        return both[..., :3], both[..., 3]
    return np.array(image.convert("RGB")), None


def _palette(image: Image.Image, transparent: int | bytes | None) -> np.ndarray:
    colours = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    palette_N4 = np.zeros((256, 4), np.uint8)  # an index beyond the palette is black
    palette_N4[:, 3] = 255
    palette_N4[: len(colours), :3] = colours
    if isinstance(transparent, bytes):
        palette_N4[: len(transparent), 3] = np.frombuffer(transparent, np.uint8)[:256]
    elif transparent is not None:
        palette_N4[transparent, 3] = 0
    return palette_N4


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether the file has 16 bits per sample, of which Pillow would keep only the upper eight."""
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    return any(";16" in mode for mode in raw_modes)


def _read_16_bit_colours(path: Path, upper_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    import cv2

    samples = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16:
        raise SlideError(
            f"a colour mask of 16 bits must be a PNG, or a TIFF without exotic compression, got path='{path}'; "
            "save one plane of labels as a grey PNG"
        )
    alpha_HW = samples[..., 3] if samples.ndim == 3 and samples.shape[2] == 4 else None
    if samples.ndim == 3:
        samples = samples[..., 2::-1]
    # OpenCV returns a damaged file as far as it was decoded.
    seen = upper_bits if upper_bits.ndim == 2 else upper_bits[..., : 1 if upper_bits.shape[2] == 2 else 3]
    if not np.array_equal(samples >> 8, np.broadcast_to(seen, samples.shape)):
        raise ValueError("its pixels do not decode to the end")
    return samples, alpha_HW


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    """Lift Pillow's limit on image sizes, which is meant for uploads; this module checks the size itself."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit

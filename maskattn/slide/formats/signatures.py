"""Leading bytes of files that are not slides, or not in a format that is read, each with its name and remedy."""

from __future__ import annotations

from typing import NamedTuple

from maskattn.slide.formats.remedies import CONVERT

__all__ = ["SIGNATURES", "Signature"]

_UNPACK = "unpack it and name the slide in it"
_EXPORT = f"export it as OME-TIFF from its vendor's software, or with Bio-Formats or QuPath, or {CONVERT}"
_PLAIN = f"a plain image has no levels and no spacing: {CONVERT}, and give its spacing with `--spacing-um`"
_NO_IMAGE = "name the slide file itself"


class Signature(NamedTuple):
    """Bytes at an offset of a file, the kind of file that they identify, and what the user can do."""

    offset: int
    magic: bytes
    what: str
    remedy: str


SIGNATURES = (
    Signature(0, b"PK\x03\x04", "a ZIP archive", _UNPACK),
    Signature(0, b"PK\x05\x06", "an empty ZIP archive", "download it again"),
    Signature(0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    Signature(0, b"BZh", "a bzip2 archive", _UNPACK),
    Signature(0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    Signature(0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    Signature(0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    Signature(0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    Signature(257, b"ustar", "a tar archive", _UNPACK),
    Signature(0, b"\xff\xd8\xff", "a plain JPEG image", _PLAIN),
    Signature(0, b"\x89PNG\r\n\x1a\n", "a plain PNG image", _PLAIN),
    Signature(0, b"GIF8", "a GIF image", _PLAIN),
    Signature(8, b"WEBP", "a WebP image", _PLAIN),
    Signature(0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a plain JPEG 2000 image", _PLAIN),
    Signature(0, b"\xff\x4f\xff\x51", "a JPEG 2000 codestream", _PLAIN),
    Signature(0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image", _PLAIN),
    Signature(0, b"II\xbc\x01", "a JPEG XR image", _PLAIN),
    Signature(4, b"ftypheic", "an HEIC image", _PLAIN),
    Signature(4, b"ftypavif", "an AVIF image", _PLAIN),
    Signature(0, b"BM", "a BMP image", _PLAIN),
    Signature(0, b"%PDF-", "a PDF document", _NO_IMAGE),
    Signature(0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as features or Imaris data", _NO_IMAGE),
    Signature(
        0, b"SQLite format 3\x00", "an SQLite file, but not one of a slide that OpenSlide knows (.svslide)", _EXPORT
    ),
    Signature(0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an OLE file, such as Zeiss ZVI or Olympus OIB", _EXPORT),
    Signature(0, b"OLYMPUSRAWFORMAT", "an Olympus OIR file", _EXPORT),
    Signature(0, b"\xda\xce\xbe\x0a", "a Nikon ND2 file", _EXPORT),
    Signature(0, b"\x70\x00\x00\x00", "a Leica LIF file", _EXPORT),
    Signature(0, b"KFB", "a KFBIO file", _EXPORT),
    Signature(0, b"SQ", "an SDPC file", _EXPORT),
)

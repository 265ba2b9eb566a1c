"""Identify a DICOM file that OpenSlide does not open, by its file meta information."""

from __future__ import annotations

import struct
from pathlib import Path

from maskattn.slide.formats.image import NotRead

__all__ = ["describe_dicom"]

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_READ = "uncompressed, JPEG and JPEG 2000"
_SYNTAXES = {
    "1.2.840.10008.1.2": "implicit VR little endian",
    "1.2.840.10008.1.2.1": "explicit VR little endian",
    "1.2.840.10008.1.2.1.99": "deflated explicit VR little endian",
    "1.2.840.10008.1.2.2": "explicit VR big endian",
    "1.2.840.10008.1.2.4.50": "JPEG baseline",
    "1.2.840.10008.1.2.4.51": "JPEG extended, 12-bit",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless, first-order prediction",
    "1.2.840.10008.1.2.4.80": "JPEG-LS lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS near-lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.110": "JPEG XL lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL recompressed JPEG",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.4.201": "high-throughput JPEG 2000 lossless",
    "1.2.840.10008.1.2.4.202": "high-throughput JPEG 2000 lossless with RPCL",
    "1.2.840.10008.1.2.4.203": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.5": "RLE lossless",
}
_READ_SYNTAXES = ("1.2.840.10008.1.2.1", *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 90, 91)))
_LONG_VRS = (b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN")
_META_BYTES = 1 << 16
_MOST_UID_BYTES = 64


def describe_dicom(path: Path) -> NotRead | None:
    """Return why OpenSlide does not open a DICOM file; None if its meta information does not say.

    Raises:
        OSError: the file cannot be read.
    """
    meta = _file_meta(path)
    kind, syntax = meta.get((2, 2)), meta.get((2, 16))
    if kind is not None and kind != _WHOLE_SLIDE:
        return NotRead(
            f"a DICOM file of another kind (SOP class {kind})",
            "name a file of a VL Whole Slide Microscopy Image",
        )
    if syntax is not None and syntax not in _READ_SYNTAXES:
        name = _SYNTAXES.get(syntax, "unknown")
        return NotRead(
            f"a DICOM slide in a transfer syntax that is not read ({name}, {syntax})",
            f"transcode it to one that is: {_READ}",
        )
    return None


def _file_meta(path: Path) -> dict[tuple[int, int], str]:
    """The texts of group 2, which every DICOM file writes in explicit VR little endian."""
    with path.open("rb") as file:
        data = file.read(_META_BYTES)
    found: dict[tuple[int, int], str] = {}
    offset = 132
    while offset + 12 <= len(data):
        group, element, vr, length = struct.unpack_from("<HH2sH", data, offset)
        offset += 8
        if group != 2:
            break
        if vr in _LONG_VRS:
            (length,) = struct.unpack_from("<I", data, offset)
            offset += 4
        if vr == b"UI" and length <= _MOST_UID_BYTES:
            found[group, element] = data[offset : offset + length].rstrip(b"\0 ").decode("ascii", errors="replace")
        offset += length
    return found

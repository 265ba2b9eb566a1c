"""Identify a file that no decoder opens, by its leading bytes, its name and the files next to it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from maskattn.slide.formats.czi import describe_czi
from maskattn.slide.formats.dicom import describe_dicom
from maskattn.slide.formats.image import NotRead
from maskattn.slide.formats.remedies import CONVERT
from maskattn.slide.formats.signatures import SIGNATURES

__all__ = ["begins_tiff", "identify_file", "identify_folder", "is_tiff"]

_HEAD_BYTES = 4096
_TIFF_HEADS = {b"II*\x00": "<", b"MM\x00*": ">", b"II+\x00": "<", b"MM\x00+": ">"}


def is_tiff(path: Path) -> bool:
    """Return whether the file begins with a TIFF header."""
    return begins_tiff(_head(path))


def begins_tiff(head: bytes) -> bool:
    """Return whether the first bytes of a file are a TIFF header."""
    return head[:4] in _TIFF_HEADS


def identify_file(path: Path, known: bool = False) -> NotRead | None:
    """Identify a file that no decoder opens; None if its bytes do not show what it is.

    Args:
        path: the file.
        known: whether a decoder recognises the format; the signatures of other formats are then not searched.

    Raises:
        OSError: the file cannot be read.
    """
    head, size = _head(path), path.stat().st_size
    if not size:
        return NotRead("an empty file (0 bytes)", "copy it again")
    if path.suffix.lower() == ".mrxs":
        return _mirax(path)
    if head[:4] in _TIFF_HEADS:
        return _tiff(head, size)
    if head[128:132] == b"DICM":
        return describe_dicom(path)
    if head.startswith(b"ZISRAWFILE"):
        return describe_czi(path)
    if known:
        return None
    for offset, magic, what, remedy in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return NotRead(what, remedy)
    if not any(head):
        return NotRead("a file that begins with zeros", "it was not copied to its end: copy it again")
    return _text(head)


def identify_folder(path: Path) -> NotRead:
    """Identify a folder that was given as a slide."""
    names = {entry.name for entry in os.scandir(path)}
    if names & {".zattrs", ".zgroup", ".zarray", "zarr.json"}:
        return NotRead(
            "a Zarr store", f"OME-Zarr is not read: export it as OME-TIFF, e.g. with raw2ometiff, or {CONVERT}"
        )
    if "Slidedat.ini" in names:
        return NotRead("the folder of a MIRAX slide", f"name the file next to it: {path.name}.mrxs")
    if any(name.lower().endswith(".dcm") for name in names):
        return NotRead("a folder of DICOM files", "name one of the full-resolution level's files")
    return NotRead("a folder", "check the path")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _mirax(path: Path) -> NotRead | None:
    folder = path.with_suffix("")
    if not folder.is_dir():
        return NotRead(
            "the first file of a MIRAX slide, whose folder is missing",
            f"its folder '{folder.name}' must be next to it: copy both",
        )
    if not (folder / "Slidedat.ini").is_file():
        return NotRead(
            f"the first file of a MIRAX slide, whose folder lacks {folder.name}/Slidedat.ini", "copy the folder again"
        )
    return None


def _tiff(head: bytes, size: int) -> NotRead | None:
    """Identify a TIFF that was cut short: its directory would begin after the end of the file."""
    order = _TIFF_HEADS[head[:4]]
    big = head[2:4] in (b"+\x00", b"\x00+")
    try:
        (directory,) = struct.unpack_from(order + "Q", head, 8) if big else struct.unpack_from(order + "I", head, 4)
    except struct.error:
        directory = size
    if directory + 2 > size:
        return NotRead(
            f"a TIFF that is cut short: it has {size:,} bytes, and its directory should lie at byte {directory:,}",
            "copy it again to its end",
        )
    return None


def _text(head: bytes) -> NotRead | None:
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < _HEAD_BYTES else "ignore").lstrip("\ufeff \r\n\t")
    except UnicodeDecodeError:
        return None
    if not text.isprintable() and not all(sign.isprintable() or sign.isspace() for sign in text):
        return None
    begins = text[:512].lower()
    if begins.startswith("version https://git-lfs"):
        return NotRead("a Git LFS pointer, not the file that it stands for", "fetch the file with `git lfs pull`")
    if begins.startswith(("<!doctype html", "<html")) or "<html" in begins:
        return NotRead(
            "a web page, such as a login or an error page that was saved in the slide's place",
            "download the slide again",
        )
    if "dpufsimport" in begins:
        return NotRead("a Philips iSyntax or an XML of Philips'", "export it as TIFF from Philips' software")
    first = text.splitlines()[0][:60] if text else ""
    return NotRead(f"a text file that begins with '{first}'", "name the slide file itself, or download it again")

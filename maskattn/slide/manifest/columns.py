"""The columns of a manifest: our names, those of other tools' tables, and what is a misspelling of one.

A column of another name is carried to the summary as it is. Two kinds are refused instead, as passing over them would
change what is computed: one that speaks of spacing or of a mask and is none that is known (``spacing_umm``, ``masks``),
and one that is all but spelt as a column of ours which the table lacks (``slide_pth``). Where the table names no files,
a column that may hold them (``path``, ``image``) is refused too.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskattn.errors import ManifestError
from maskattn.slide.names import as_text, shortened

__all__ = ["Columns", "is_known_column", "last_named", "locate_columns"]

_NAMES = {
    "slide_id": ("slide_id", "sample_id"),
    "slide_path": ("slide_path", "image_path", "wsi_path", "wsi"),
    "mask_path": ("mask_path", "tissue_mask_path"),
    "spacing_um": ("spacing_um", "mpp", "spacing_at_level_0"),
    "slide_file": ("filename",),
}
"""Ours, then those of other tools' tables: slide2vec's and hs2p's (sample_id, image_path, spacing_at_level_0),
TRIDENT's (wsi, mpp) and STAMP's (FILENAME, of the slide's features). CLAM's (case_id, slide_id, label) has no files."""

_OURS = {other.replace("_", ""): ours for ours, others in _NAMES.items() for other in others}
# A column that speaks of these changes what is computed: where its name is not known, it must not be passed over.
_WEIGHTY = re.compile("spacing|mpp|micron|mask")
# What hs2p's process_list.csv has of them that changes nothing.
_WEIGHTLESS = {"maskpreviewpath", "maskbackend", "requestedmaskbackend"}
_OF_FILES = re.compile("path|file|wsi|image|url|location")
_ALIKE = 0.8


@dataclass(frozen=True)
class Columns:
    """Where the columns of a table are.

    Attributes:
        ours: our name → index: ``slide_id``, ``slide_path``, ``mask_path``, ``spacing_um``, ``slide_file``.
        carried: name, as the table has it → index, of the columns that are carried to the summary.
        nameless: how many have no name, and are passed over.
        by_name: whether the slides are named by their files, as TRIDENT's ``wsi`` does, or by their ids alone, so that
            they may lie in a folder that is named beside the table.
    """

    ours: dict[str, int]
    carried: dict[str, int]
    nameless: int
    by_name: bool


def is_known_column(name: str) -> bool:
    """Whether a column of this name is read; case, spaces and hyphens do not matter."""
    return _plain(name) in _OURS


def locate_columns(header: Sequence[str], manifest: Path) -> Columns:
    """Where a table's columns are.

    Raises:
        ManifestError: a column is missing, comes twice, or seems to be a misspelling of ours.
    """
    plain = [_plain(name) for name in header]
    named = {_OURS[name] for name in plain if name in _OURS}
    with_paths = "slide_path" in named
    ours: dict[str, int] = {}
    carried: dict[str, int] = {}
    twice, misspelt, nameless = [], [], 0
    for index, name in enumerate(header):
        our_name = _OURS.get(plain[index])
        # STAMP's FILENAME is of a file of features: a path of the slide is worth more.
        if our_name == "slide_file" and with_paths:
            our_name = None
        if our_name in ours:
            twice.append(name)
        elif our_name is not None:
            ours[our_name] = index
        elif _seems_misspelt(plain[index], named, with_paths):
            misspelt.append(name)
        elif name:
            carried[_distinct(name, carried)] = index
        else:
            nameless += index < last_named(header)
    wsi = with_paths and "wsi" in plain
    missing = []
    if not {"slide_id", "slide_file"} & named and not wsi:
        missing.append("slide_id")
    if not with_paths and (misspelt or missing):
        missing.append("slide_path")
    faults = {"missing": missing, "more than once": twice, "unknown": misspelt}
    if missing:
        faults["unknown"] = misspelt + [name or "(no name)" for name in carried]
    if any(faults.values()):
        told = "; ".join(f"{fault}: {', '.join(map(as_text, names))}" for fault, names in faults.items() if names)
        raise ManifestError(
            "a manifest must have the columns slide_id, slide_path and may have mask_path, spacing_um, each once; got "
            f"{shortened(', '.join(header)) or 'no header'} in {as_text(manifest)}; {told}"
            + ("" if missing else "; give each the name of what it is, or drop it")
        )
    return Columns(ours, carried, nameless, by_name=wsi or not with_paths)


def last_named(header: Sequence[str]) -> int:
    """Where the header's last name is: fields beyond it have no column. -1 = nowhere."""
    return max((index for index, name in enumerate(header) if name), default=-1)


def _seems_misspelt(name: str, named: set[str], with_paths: bool) -> bool:
    """Whether a column that is not known must not be passed over."""
    if _WEIGHTY.search(name) and name not in _WEIGHTLESS:
        return True
    if not with_paths and _OF_FILES.search(name):
        return True
    alike = difflib.get_close_matches(name, _OURS, 1, _ALIKE)
    return bool(alike) and _OURS[alike[0]] not in named and not (with_paths and _OURS[alike[0]] == "slide_file")


def _distinct(name: str, taken: dict[str, int]) -> str:
    """The name, or one with a number where another column has it."""
    number = 2
    distinct = name
    while distinct in taken:
        distinct, number = f"{name}_{number}", number + 1
    return distinct


def _plain(name: str) -> str:
    """A column's name without what does not tell columns apart; the sign for micro is a u."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold()).replace("μ", "u")

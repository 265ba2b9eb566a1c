"""Locate the columns of a manifest by this package's names and those of other tools, and detect misspellings.

A column with an unknown name is copied to the summary. Two kinds are refused instead, because ignoring them would
change the result: an unknown name about spacing or masks (``spacing_umm``, ``masks``), and a name almost equal to a
column that the table lacks (``slide_pth``). If the table names no files, a column that may hold them (``path``,
``image``) is refused too.
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
"""Our name → accepted names, those of other tools included: slide2vec and hs2p (sample_id, image_path,
spacing_at_level_0), TRIDENT (wsi, mpp) and STAMP (FILENAME, of the slide's features). CLAM's tables (case_id, slide_id,
label) name no files."""

_OURS = {other.replace("_", ""): ours for ours, others in _NAMES.items() for other in others}
# A column about these changes the result, so one with an unknown name must not be ignored.
_WEIGHTY = re.compile("spacing|mpp|micron|mask")
# Such columns of hs2p's process_list.csv that do not change the result.
_WEIGHTLESS = {"maskpreviewpath", "maskbackend", "requestedmaskbackend"}
_OF_FILES = re.compile("path|file|wsi|image|url|location")
_ALIKE = 0.8


@dataclass(frozen=True)
class Columns:
    """The positions of the columns of a table.

    Attributes:
        ours: our name → index: ``slide_id``, ``slide_path``, ``mask_path``, ``spacing_um``, ``slide_file``.
        carried: name in the table → index, for the columns that are copied to the summary.
        nameless: the number of columns without a name, which are ignored.
        by_name: whether the table gives only file names (TRIDENT's ``wsi``) or ids, so that the slides may be in a
            folder that is named along with the table.
    """

    ours: dict[str, int]
    carried: dict[str, int]
    nameless: int
    by_name: bool


def is_known_column(name: str) -> bool:
    """Return whether a column of this name is read; case, spaces, hyphens and underscores do not matter."""
    return _plain(name) in _OURS


def locate_columns(header: Sequence[str], manifest: Path) -> Columns:
    """Locate the columns of a table.

    Raises:
        ManifestError: a column is missing, comes twice, or seems to be misspelt.
    """
    plain = [_plain(name) for name in header]
    named = {_OURS[name] for name in plain if name in _OURS}
    with_paths = "slide_path" in named
    ours: dict[str, int] = {}
    carried: dict[str, int] = {}
    twice, misspelt, nameless = [], [], 0
    for index, name in enumerate(header):
        our_name = _OURS.get(plain[index])
        # STAMP's FILENAME is a file of features, so a path of the slide takes precedence.
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
        found = "; ".join(f"{fault}: {', '.join(map(as_text, names))}" for fault, names in faults.items() if names)
        raise ManifestError(
            "a manifest must have the columns slide_id, slide_path and may have mask_path, spacing_um, each once; got "
            f"{shortened(', '.join(header)) or 'no header'} in {as_text(manifest)}; {found}"
            + ("" if missing else "; give each the name of what it is, or drop it")
        )
    return Columns(ours, carried, nameless, by_name=wsi or not with_paths)


def last_named(header: Sequence[str]) -> int:
    """Return the index of the header's last name, beyond which fields have no column; -1 if there are no names."""
    return max((index for index, name in enumerate(header) if name), default=-1)


def _seems_misspelt(name: str, named: set[str], with_paths: bool) -> bool:
    """Return whether an unknown column must be refused instead of ignored."""
    if _WEIGHTY.search(name) and name not in _WEIGHTLESS:
        return True
    if not with_paths and _OF_FILES.search(name):
        return True
    alike = difflib.get_close_matches(name, _OURS, 1, _ALIKE)
    return bool(alike) and _OURS[alike[0]] not in named and not (with_paths and _OURS[alike[0]] == "slide_file")


def _distinct(name: str, taken: dict[str, int]) -> str:
    """Return the name, with a number appended if another column has it already."""
    number = 2
    distinct = name
    while distinct in taken:
        distinct, number = f"{name}_{number}", number + 1
    return distinct


def _plain(name: str) -> str:
    """Return a column's name without case, spaces, hyphens and underscores, and with u for the micro sign."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold()).replace("μ", "u")

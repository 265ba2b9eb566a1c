"""The columns of a manifest: our names, those of other tools' tables, and what is a misspelling of one."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from maskattn.errors import ManifestError
from maskattn.slide.names import as_text, shortened

__all__ = ["is_known_column", "last_named", "locate_columns"]

_NAMES = {
    "slide_id": ("slide_id", "sample_id"),
    "slide_path": ("slide_path", "image_path", "wsi_path", "wsi"),
    "mask_path": ("mask_path", "tissue_mask_path"),
    "spacing_um": ("spacing_um", "mpp", "spacing_at_level_0"),
}
"""Ours, then those of slide2vec's and hs2p's tables (sample_id, image_path, ...) and of TRIDENT's (wsi, mpp)."""

_OURS = {other.replace("_", ""): ours for ours, others in _NAMES.items() for other in others}
# A column that speaks of these changes what is computed: where its name is not known, it must not be passed over.
_WEIGHTY = re.compile("spacing|mpp|micron|mask")
_ALIKE = 0.8


def is_known_column(name: str) -> bool:
    """Whether a column of this name is read; case, spaces and hyphens do not matter."""
    return _plain(name) in _OURS


def locate_columns(header: Sequence[str], manifest: Path) -> tuple[dict[str, int], list[str]]:
    """Where our columns are, by our names, and the names of those that are passed over.

    Raises:
        ManifestError: a column is missing, comes twice, or seems to be a misspelling of ours.
    """
    columns: dict[str, int] = {}
    twice, misspelt, others = [], [], []
    for index, name in enumerate(header):
        ours = _OURS.get(_plain(name))
        if ours in columns:
            twice.append(name)
        elif ours is not None:
            columns[ours] = index
        elif difflib.get_close_matches(_plain(name), _OURS, 1, _ALIKE) or _WEIGHTY.search(_plain(name)):
            misspelt.append(name)
        elif name or index < last_named(header):
            others.append(name or "(no name)")
    named_by_file = "slide_path" in columns and _plain(header[columns["slide_path"]]) == "wsi"
    missing = [
        name
        for name in ("slide_id", "slide_path")
        if name not in columns and not (name == "slide_id" and named_by_file)
    ]
    faults = {"missing": missing, "more than once": twice, "unknown": misspelt}
    if missing:
        faults["unknown"] = misspelt + others
    if any(faults.values()):
        told = "; ".join(f"{fault}: {', '.join(map(as_text, names))}" for fault, names in faults.items() if names)
        raise ManifestError(
            "a manifest must have the columns slide_id, slide_path and may have mask_path, spacing_um, each once; got "
            f"{shortened(', '.join(header)) or 'no header'} in {as_text(manifest)}; {told}"
            + ("" if missing else "; give each the name of what it is, or drop it")
        )
    return columns, others


def last_named(header: Sequence[str]) -> int:
    """Where the header's last name is: fields beyond it have no column. -1 = nowhere."""
    return max((index for index, name in enumerate(header) if name), default=-1)


def _plain(name: str) -> str:
    """A column's name without what does not tell columns apart; the sign for micro is a u."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold()).replace("μ", "u")

"""Folder search: the slides of a folder, what a glob matches, and a note on what was passed over."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from maskattn.errors import quoted
from maskattn.slide.file_checks import is_folder, may_read
from maskattn.slide.names import as_text

__all__ = ["SLIDE_SUFFIXES", "match_glob", "search_folder"]

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".qptiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu"),
    *(".svslide", ".dcm"),
)
"""What a folder is searched for; ``.ome.tif`` and the like are among them. A DICOM slide is many ``.dcm`` files."""

_NO_SUFFIX = "without an ending"


def search_folder(folder: Path, on_note: Callable[[str], None]) -> list[Path]:
    """The folder's own slides by name, broken links included; not those of subfolders, and no hidden files.

    Args:
        folder: to search.
        on_note: called with one sentence on what is skipped: files with other extensions, and subfolders.

    Raises:
        OSError: the folder cannot be read.
    """
    slides: list[Path] = []
    folders: set[str] = set()
    others: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                folders.add(entry.name)
            elif suffix in SLIDE_SUFFIXES:
                slides.append(folder / entry.name)
            else:
                others[as_text(suffix) or _NO_SUFFIX] += 1
    # An .mrxs slide keeps its pixels in a folder of its own name.
    folders -= {slide.stem for slide in slides if slide.suffix.lower() == ".mrxs"}
    if others or folders:
        below = folder / "**" / f"*{slides[0].suffix if slides else SLIDE_SUFFIXES[0]}"
        on_note(f"in {as_text(folder)}, passed over {_told(others, len(folders), below)}")
    return slides


def match_glob(pattern: Path) -> list[Path]:
    """The files and folders that a glob matches, by name, broken links included, and the folders that hide matches.

    Folders that ``**`` matches are left out, as the files in them are matched on their own account; those on the way
    that this user may not list, which :func:`glob.glob` passes over, are there, so that they are found to be so.
    """
    found = map(Path, sorted(glob.glob(os.fspath(pattern), recursive=True)))
    return [path for path in found if "**" not in pattern.parts or not is_folder(path)] + _closed_folders(pattern)


def _closed_folders(pattern: Path) -> list[Path]:
    """The folders that a glob would look into and that this user may not list."""
    on_the_way = {
        folder
        for parts in range(1, len(pattern.parts))
        for folder in glob.glob(os.path.join(*pattern.parts[:parts]), recursive=True)
    }
    return [Path(folder) for folder in sorted(on_the_way) if is_folder(folder) and not may_read(folder)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()  # for most entries the folder's listing has said so already
    except OSError:
        return False


def _told(others: Counter[str], folders: int, below: Path) -> str:
    """Describe what a search left out."""
    parts = []
    if others:
        count = others.total()
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items(), key=lambda kind: -kind[1]))
        parts.append(f"{_count(count, 'file')} that {'is no slide' if count == 1 else 'are no slides'}: {kinds}")
    if folders:
        parts.append(f"{_count(folders, 'folder')} in it (to search all below it: {quoted(below)})")
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

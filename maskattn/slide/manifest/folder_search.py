"""Find the slides of a folder or of a glob, with a note on what was skipped."""

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
"""The suffixes of slides in a folder; ``.tif`` includes ``.ome.tif``. A DICOM slide has many ``.dcm`` files."""

_NO_SUFFIX = "without an ending"


def search_folder(folder: Path, on_note: Callable[[str], None]) -> list[Path]:
    """Return the slides in a folder, sorted by name, with broken links, but without subfolders and hidden files.

    Args:
        folder: the folder to search.
        on_note: called with one sentence on skipped files with other suffixes and skipped subfolders, if there are any.

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
    """Return the files and folders that a glob matches, sorted by name, and the folders that it cannot look into.

    Folders matched by ``**`` are left out, because the glob matches the files in them too. Folders along the pattern
    that this user may not list, which :func:`glob.glob` silently skips, are appended, so that they are reported.
    """
    found = map(Path, sorted(glob.glob(os.fspath(pattern), recursive=True)))
    return [path for path in found if "**" not in pattern.parts or not is_folder(path)] + _closed_folders(pattern)


def _closed_folders(pattern: Path) -> list[Path]:
    """Return the folders that a glob would look into and that this user may not list."""
    along_pattern = {
        folder
        for parts in range(1, len(pattern.parts))
        for folder in glob.glob(os.path.join(*pattern.parts[:parts]), recursive=True)
    }
    return [Path(folder) for folder in sorted(along_pattern) if is_folder(folder) and not may_read(folder)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()  # which for most entries needs no further system call
    except OSError:
        return False


def _told(others: Counter[str], folders: int, below: Path) -> str:
    """Describe the files and folders that a search skipped."""
    kinds_skipped = []
    if others:
        count = others.total()
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items(), key=lambda kind: -kind[1]))
        kinds_skipped.append(
            f"{_count(count, 'file')} that {'is no slide' if count == 1 else 'are no slides'}: {kinds}"
        )
    if folders:
        kinds_skipped.append(f"{_count(folders, 'folder')} in it (to search all below it: {quoted(below)})")
    return "; ".join(kinds_skipped)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

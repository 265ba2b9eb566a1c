"""Group ``.dcm`` files into slides: a DICOM slide has one or more files per level, with one Series Instance UID.

OpenSlide opens any of these files and finds the others in the folder. The file of the largest level represents the
slide.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from maskattn.slide.formats.dicom_series import SeriesFile, read_series_file
from maskattn.slide.names import id_of_file

__all__ = ["one_per_series"]

_SUFFIX = ".dcm"


def one_per_series(
    paths: Sequence[Path], series_of: Callable[[Path], SeriesFile | None] | None = None
) -> dict[Path, str]:
    """Return the paths with their slides' ids, reduced to one ``.dcm`` file per series.

    A series that makes up its whole folder gets the folder's name as id, because DICOM files are rarely named after the
    slide.

    Args:
        paths: the files.
        series_of: reads a file's series; None reads it from the disk.
    """
    series_of = series_of or read_series_file
    paths = list(dict.fromkeys(paths))
    per_folder = Counter(path.parent for path in paths)
    several = Counter(path.parent for path in paths if path.suffix.lower() == _SUFFIX)
    series: dict[tuple[Path, str], dict[Path, SeriesFile]] = {}
    for path in paths:
        if path.suffix.lower() == _SUFFIX and several[path.parent] > 1:
            found = series_of(path)
            if found is not None:
                series.setdefault((path.parent, found.series_uid), {})[path] = found
    ids = {path: id_of_file(path) for path in paths}
    for (folder, _), files in series.items():
        first = max(files, key=lambda path: (files[path].is_level, files[path].columns))
        for path in files.keys() - {first}:
            del ids[path]
        if len(files) == per_folder[folder] > 1:
            ids[first] = id_of_file(f"{os.path.abspath(folder)}{_SUFFIX}")
    return ids

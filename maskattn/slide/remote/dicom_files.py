"""The files of a DICOM slide at a URL: those of its folder that are of the same series.

Their store has to list the folder and to give parts of files, of which the first ones tell the series.
"""

from __future__ import annotations

import functools
import io
from dataclasses import replace

from maskattn.slide.formats.dicom_series import SeriesFile, read_series
from maskattn.slide.remote.files import RemoteFile, list_files, look_up
from maskattn.slide.remote.range_requests import CopyNeeded, RangeRequests
from maskattn.slide.remote.stores import StoreError
from maskattn.slide.remote.urls import is_web, path_of_url, shown_url

__all__ = ["is_dicom", "series_at", "series_files"]

_SUFFIX = ".dcm"
# Most headers fit into the first, of which a store sends as many as there are files.
_HEADER_BYTES = (1 << 16, 1 << 22)


def is_dicom(url: str) -> bool:
    """Return whether a URL is that of a DICOM file, by its name."""
    return path_of_url(url).suffix.lower() == _SUFFIX


def series_at(remote: RemoteFile) -> SeriesFile | None:
    """Return the series of a remote DICOM file; None if it is none of a kind that is read.

    Raises:
        StoreError: its beginning cannot be read.
    """
    if remote.bytes is None or not remote.etag:
        remote = look_up(remote.url)
    return _series_at(replace(remote, others=()))


def series_files(main: RemoteFile) -> tuple[RemoteFile, ...]:
    """Return the other files of a slide's series, sorted by name.

    Args:
        main: one of its files, looked up.

    Raises:
        StoreError: the file is of no series, its folder is not listed, or a file cannot be read.
    """
    series = series_at(main)
    if series is None:
        raise StoreError(
            f"a DICOM slide must be of a series, got {shown_url(main.url)}, whose header names none; check the file"
        )
    url = main.url.partition("?")[0] if is_web(main.url) else main.url
    folder = url.rpartition("/")[0] + "/"
    try:
        found = [file for file in list_files(folder)[0] if is_dicom(file.url)]
    except StoreError as error:
        raise StoreError(f"{error} ({_NEEDED})", error.passing) from error
    if path_of_url(url) not in {path_of_url(file.url) for file in found}:
        raise StoreError(
            f"a DICOM slide must be in a folder that its store lists, got {shown_url(main.url)}, which is not in the "
            f"list of its folder; copy the slide to a disk ({_NEEDED})"
        )
    others = (look_up(file.url) for file in found if path_of_url(file.url) != path_of_url(url))
    return tuple(other for other in others if (one := series_at(other)) and one.series_uid == series.series_uid)


_NEEDED = "the other files of a DICOM slide are found in the list of its folder"


@functools.lru_cache(maxsize=4096)
def _series_at(remote: RemoteFile) -> SeriesFile | None:
    if remote.bytes is None:
        raise _no_parts(remote)
    requests = RangeRequests(remote)
    try:
        for size in _HEADER_BYTES:
            found = read_series(io.BytesIO(requests.read(0, min(size, remote.bytes)))) if remote.bytes else None
            if found is not None or remote.bytes <= size:
                return found
    except CopyNeeded as error:
        raise _no_parts(remote) from error
    finally:
        requests.close()
    return None


def _no_parts(remote: RemoteFile) -> StoreError:
    return StoreError(
        f"a DICOM slide must be in a store that gives parts of files, got {shown_url(remote.url)}, of which the server "
        "sends the whole only; copy the slide to a disk"
    )

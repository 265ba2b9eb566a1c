"""Remote slides with all of their files: MIRAX has its pixels in a folder of its own name, DICOM a file for each level.

Slides of other formats that consist of several files are refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from maskattn.slide.remote.dicom_files import is_dicom, series_files
from maskattn.slide.remote.files import RemoteFile, list_files, look_up, problem_of_url
from maskattn.slide.remote.stores import StoreError
from maskattn.slide.remote.urls import name_of_url, path_of_url, shown_url

__all__ = ["folder_of_others", "look_up_main", "look_up_slide"]

_MIRAX = ".mrxs"


def look_up_slide(url: str) -> RemoteFile:
    """Look up a slide and, if it has several files, the others; its ETag is then one of them all.

    Raises:
        StoreError: it does not exist, may not be read, or the store does not answer.
    """
    problem = problem_of_url(url)
    if problem is not None:
        raise StoreError(problem)
    main = look_up(url)
    if is_dicom(url):
        return _grouped(main, series_files(main))
    if path_of_url(url).suffix.lower() != _MIRAX:
        return main
    folder = url[: -len(_MIRAX)] if url.lower().endswith(_MIRAX) else ""
    found, _ = list_files(f"{folder}/") if folder else ([], 0)
    others = tuple(look_up(other.url) if other.bytes is None else other for other in found)
    if not others:
        raise StoreError(
            f"a MIRAX slide must have its pixels in a folder of its name, got none beside {shown_url(url)} that this "
            "store lists; copy the slide to a disk"
        )
    return _grouped(main, others)


def look_up_main(slide: RemoteFile) -> RemoteFile:
    """Look up the file that names a slide of several files, by itself.

    Raises:
        StoreError: it is not that of this version of the slide any more.
    """
    main = look_up(slide.url) if slide.others else slide
    if not _grouped(main, slide.others).is_unchanged(slide):
        raise StoreError(f"a slide must stay as it is while it is copied, got {shown_url(slide.url)}; run it again")
    return main


def folder_of_others(path: Path) -> Path:
    """Return the folder of a slide's other files: of its name for MIRAX, its own for DICOM."""
    return path.with_suffix("") if path.suffix.lower() == _MIRAX else path.parent


def _grouped(main: RemoteFile, others: tuple[RemoteFile, ...]) -> RemoteFile:
    if not others:
        return main
    versions = "\n".join(f"{name_of_url(file.url)} {file.bytes} {file.etag}" for file in (main, *others))
    etag = hashlib.sha256(versions.encode()).hexdigest()[:32]
    return RemoteFile(main.url, main.bytes, etag, main.md5, main.md5_likely, others)

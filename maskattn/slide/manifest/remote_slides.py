"""Jobs of slides in object stores and on web servers: one for a file's URL, several for a folder's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from maskattn.errors import ManifestError
from maskattn.slide.manifest.dicom_series import one_per_series
from maskattn.slide.manifest.folder_search import SLIDE_SUFFIXES
from maskattn.slide.manifest.job import SlideJob
from maskattn.slide.names import as_text, id_of_file, problem_of_id, shortened
from maskattn.slide.remote.dicom_files import series_at
from maskattn.slide.remote.files import RemoteFile, list_files, problem_of_url
from maskattn.slide.remote.stores import StoreError
from maskattn.slide.remote.urls import is_web, name_of_url, path_of_url, shown_url

__all__ = ["jobs_at", "refuse_remote", "remote_job"]


def jobs_at(url: str, on_note: Callable[[str], None]) -> list[SlideJob]:
    """Return the job of a slide's URL, or those of the slides in a remote folder, whose URL ends with a slash.

    Args:
        url: of a slide or a folder.
        on_note: called with a sentence on what the folder has besides slides.

    Raises:
        ManifestError: the folder cannot be listed, or has no slides.
    """
    if not url.endswith("/"):
        if not is_web(url) and "*" in url:
            raise ManifestError(
                f"a glob must be one of local files, got {shown_url(url)}; end a folder's URL with / to list its slides"
            )
        return [remote_job(RemoteFile(url))]
    try:
        files, folders = list_files(url)
    except StoreError as error:
        raise ManifestError(str(error)) from error
    slides = [file for file in files if _suffix(file) in SLIDE_SUFFIXES and not name_of_url(file.url).startswith(".")]
    others = Counter(as_text(_suffix(file)) or "without an ending" for file in files if file not in slides)
    # A MIRAX slide keeps its pixels in a folder of its own name.
    folders -= sum(_suffix(file) == ".mrxs" for file in slides)
    if others or folders > 0:
        told = [f"{count} {suffix}" for suffix, count in sorted(others.items())]
        told += [f"{folders} folder{'s' * (folders > 1)}"] * (folders > 0)
        on_note(f"in {shown_url(url)}, passed over {', '.join(told)}")
    if not slides:
        raise ManifestError(
            f"a folder must hold slides ({', '.join(SLIDE_SUFFIXES)}), got none in {shown_url(url)} that its store "
            "lists; name the files"
        )
    by_path = {path_of_url(file.url): file for file in slides}
    try:
        ids = one_per_series(list(by_path), lambda path: series_at(by_path[path]))
    except StoreError as error:
        raise ManifestError(str(error)) from error
    return [remote_job(by_path[path], slide_id) for path, slide_id in ids.items()]


def remote_job(file: RemoteFile, slide_id: str | None = None) -> SlideJob:
    """Return the job of a remote slide that no manifest names; its id is the file's name if none is given."""
    path = path_of_url(file.url)
    slide_id = slide_id or id_of_file(path)
    problem = problem_of_url(file.url) or problem_of_id(slide_id)
    return SlideJob(shortened(slide_id), path, problem=problem, origin=file)


def refuse_remote(jobs: Iterable[SlideJob], command: str) -> None:
    """Refuse remote slides where slides are read at any time, and not one after another.

    Raises:
        ManifestError: one of the slides is remote.
    """
    for job in jobs:
        if job.is_remote:
            raise ManifestError(
                f"maskattn {command} needs slides and masks on a disk, got a URL for {job.slide_id!r}; copy them first"
            )


def _suffix(file: RemoteFile) -> str:
    return path_of_url(file.url).suffix.lower()

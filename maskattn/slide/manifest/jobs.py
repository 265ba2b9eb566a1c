"""Turn the paths, globs, folders, URLs and tables that a user names into one job per slide.

A table has a header ``slide_id,slide_path[,mask_path][,spacing_um]``; relative paths start at the table's own folder.
Tables of other tools are read too, also those that give only ids or file names (CLAM, STAMP, TRIDENT): their slides are
in the table's folder, or in a folder named along with it, which then is not a source of its own. Other columns are
copied to the summary. A mistake in the request (a missing column, a repeated ``slide_id``) is an error before anything
runs. A mistake in one row, or a missing file, becomes a job with a ``problem``: it fails in the summary, and the others
run.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from maskattn.errors import ManifestError
from maskattn.slide.file_checks import is_folder, is_there, problem_of_file, same_file
from maskattn.slide.manifest.columns import is_known_column, last_named, locate_columns
from maskattn.slide.manifest.dicom_series import one_per_series
from maskattn.slide.manifest.folder_search import SLIDE_SUFFIXES, match_glob, search_folder
from maskattn.slide.manifest.job import SlideJob
from maskattn.slide.manifest.remote_slides import jobs_at
from maskattn.slide.manifest.rows import TableRows
from maskattn.slide.manifest.spreadsheet import read_records
from maskattn.slide.names import as_text, problem_of_id, shortened
from maskattn.slide.remote.urls import is_url, path_of_url, shown_url

__all__ = ["SLIDE_SUFFIXES", "SlideJob", "collect_jobs", "read_manifest"]

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
"""The suffixes of manifests, and of workbooks, which are refused with advice on how to save them as CSV."""


def collect_jobs(
    sources: Sequence[str | Path], on_note: Callable[[str], None] | None = None, manifest: Path | None = None
) -> list[SlideJob]:
    """Collect jobs from slide paths, globs, folders (without their subfolders), URLs and manifests, in order.

    A slide that two sources name is one job. A source without slides, among others with slides, is a job that fails.

    Args:
        sources: what the user named; ``.csv``, ``.tsv`` and ``.txt`` are manifests.
        on_note: called with a sentence on everything skipped: other files of a folder, other columns of a manifest.
        manifest: one more manifest, which may have any suffix.

    Raises:
        ManifestError: nothing was named, no source has a slide, two different slides have the same ``slide_id``, or
            ``manifest`` is not a manifest.
    """
    on_note = on_note or _keep_quiet
    matches = [match for source in sources for match in _matches_of(source)]
    folders = [path for path in matches if isinstance(path, Path) and is_folder(path)]
    rows, looked_in = ([], set[Path]()) if manifest is None else _read_table(manifest, on_note, folders)
    if not sources and not rows:
        raise ManifestError(
            "infer needs at least one slide, got none; name slide files, folders, globs or a CSV manifest"
        )
    named: dict[int, Sequence[SlideJob | Path]] = {}
    errors: list[ManifestError] = []
    # Tables come first: a folder that holds a table's slides is not a source of its own.
    for index in sorted(range(len(matches)), key=lambda index: not _is_table(matches[index])):
        path = matches[index]
        try:
            if isinstance(path, str):
                named[index] = _jobs_at(path, on_note)
            elif _is_table(path):
                named[index], table_folders = _read_table(path, on_note, folders)
                looked_in |= table_folders
            elif path not in looked_in:
                named[index] = _slides_of(path, on_note)
        except ManifestError as error:
            errors.append(error)
            named[index] = [_failing_job(path, str(error))]
    slides = [slide for index in sorted(named) for slide in named[index]] + rows
    if len(errors) == len(slides):
        raise errors[0]
    ids = one_per_series([slide for slide in slides if isinstance(slide, Path)])
    jobs = (_job_of_path(slide, ids.get(slide)) if isinstance(slide, Path) else slide for slide in slides)
    return _unique(job for job in jobs if job is not None)


def read_manifest(
    path: Path, on_note: Callable[[str], None] | None = None, folders: Sequence[Path] = ()
) -> list[SlideJob]:
    """Read the jobs of a manifest, one per row; empty rows are skipped.

    The table may come from a spreadsheet program or another tool: with commas, semicolons or tabs, in UTF-8, UTF-16 or
    Windows' code page, with decimal commas, and with further columns.

    Args:
        path: the table.
        on_note: called with a sentence on columns that are copied to the summary, and on those that are skipped.
        folders: further folders to search for slides that the table names only by id or file name.

    Raises:
        ManifestError: the file cannot be read, a column is missing or misspelt, there are no rows, or a ``slide_id``
            is repeated.
    """
    return _read_table(path, on_note or _keep_quiet, folders)[0]


def _read_table(
    path: Path, on_note: Callable[[str], None], folders: Sequence[Path]
) -> tuple[list[SlideJob], set[Path]]:
    """Read the jobs of a table; return them with those of ``folders`` that are searched for its slides."""
    records = read_records(path, is_known_column)
    header = records[0].fields if records else ()
    columns = locate_columns(header, path)
    if columns.carried:
        on_note(f"in {as_text(path)}, carried to the summary {_listed(columns.carried)}")
    if columns.nameless:
        several = "s" * (columns.nameless > 1)
        on_note(f"in {as_text(path)}, passed over {columns.nameless} column{several} without a name")
    rows = TableRows(path, columns, last_named(header) + 1, folders)
    jobs = [rows.job(record) for record in records[1:]]
    if not jobs:
        raise ManifestError(f"a manifest must have at least one row below its header, got none in {as_text(path)}")
    seen: set[str] = set()
    for job in jobs:
        if job.slide_id in seen:
            raise ManifestError(
                f"slide_id must be unique, got {job.slide_id!r} twice in {as_text(path)}; "
                "give each slide an id of its own"
            )
        seen.add(job.slide_id)
    return jobs, rows.looked_in


def _listed(names: Iterable[str]) -> str:
    names = list(map(as_text, names))
    return f"the column{'' if len(names) == 1 else 's'} {', '.join(names)}"


def _keep_quiet(note: str) -> None:
    """Ignore a note."""


def _matches_of(source: str | Path) -> Sequence[str | Path]:
    """Return the matches of a source that is a glob, else the source itself; a URL stays a text."""
    if isinstance(source, str) and is_url(source):
        return [source]
    path = Path(source)
    return (match_glob(path) if _is_glob(path) else []) or [path]


def _is_glob(path: Path) -> bool:
    return glob.has_magic(os.fspath(path)) and not is_there(path)


def _slides_of(path: Path, on_note: Callable[[str], None]) -> Sequence[Path]:
    """Return the slides of a folder, or the path itself."""
    if is_folder(path):
        return _slides_of_folder(path, on_note)
    if _is_glob(path):
        raise ManifestError(
            f"a glob must match at least one file, got no match for {as_text(path)}; check the folder and quotes"
        )
    return [path]


def _jobs_at(url: str, on_note: Callable[[str], None]) -> list[SlideJob]:
    if path_of_url(url).suffix.lower() in _TABLE_SUFFIXES:
        raise ManifestError(
            f"a manifest must be on a disk, got {shown_url(url)}; copy it, and write the slides' URLs in it whole"
        )
    return jobs_at(url, on_note)


def _failing_job(source: str | Path, problem: str) -> SlideJob:
    """Return the job of a source without slides."""
    name, path = (shown_url(source), path_of_url(source)) if isinstance(source, str) else (source, source)
    return SlideJob(shortened(name), path, problem=problem)


def _is_table(path: str | Path) -> bool:
    """Return whether a source is read as a manifest."""
    return (
        isinstance(path, Path) and path.suffix.lower() in _TABLE_SUFFIXES and not is_folder(path) and not _is_glob(path)
    )


def _slides_of_folder(folder: Path, on_note: Callable[[str], None]) -> list[Path]:
    try:
        found = search_folder(folder, on_note)
    except OSError as error:
        raise ManifestError(
            f"a folder of slides must be readable, got {as_text(folder)}: {error.strerror}; "
            "ask its owner for permission"
        ) from error
    if not found:
        raise ManifestError(
            f"a folder must hold slides ({', '.join(SLIDE_SUFFIXES)}), got none in {as_text(folder)}; name the files"
        )
    return found


def _job_of_path(path: Path, slide_id: str | None) -> SlideJob | None:
    """Return the job of a path from no manifest; None if another file of its series represents the slide."""
    if slide_id is None:
        return None
    return SlideJob(shortened(slide_id), path, problem=problem_of_file(path, "slide") or problem_of_id(slide_id))


def _unique(jobs: Iterable[SlideJob]) -> list[SlideJob]:
    by_id: dict[str, SlideJob] = {}
    for job in jobs:
        other = by_id.setdefault(job.slide_id, job)
        if other is job:
            continue
        if not same_file(other.path, job.path):
            raise ManifestError(
                f"slide_id must be unique, got {job.slide_id!r} for both {as_text(other.where)} and "
                f"{as_text(job.where)}; give each an id of its own in a manifest (slide_id,slide_path)"
            )
        by_id[job.slide_id] = _merged(other, job)
    return list(by_id.values())


def _merged(one: SlideJob, other: SlideJob) -> SlideJob:
    """Merge two jobs of one slide, with the fields that either states.

    Raises:
        ManifestError: they contradict each other.
    """
    for name in ("mask_path", "spacing_um"):
        stated = {getattr(job, name) for job in (one, other)} - {None}
        if len(stated) > 1:
            raise ManifestError(
                f"a slide that is named twice must have one {name}, got {' and '.join(sorted(map(str, stated)))} for "
                f"{one.slide_id!r}; name it once"
            )
    return replace(
        one,
        mask_path=one.mask_path or other.mask_path,
        mask_origin=one.mask_origin or other.mask_origin,
        spacing_um=one.spacing_um or other.spacing_um,
        problem=one.problem or other.problem,
        carried=tuple((dict(other.carried) | dict(one.carried)).items()),
    )

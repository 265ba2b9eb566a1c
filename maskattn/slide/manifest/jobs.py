"""Manifest: what a user named (paths, globs, folders, tables) → one job per slide.

A table has a header ``slide_id,slide_path[,mask_path][,spacing_um]``; relative paths start at the table's own folder.
Other tools' tables are understood too, also those that name slides by id or file alone (CLAM's, STAMP's, TRIDENT's):
then the slides lie in the table's folder, or in a folder that is named beside it and is not a source of its own.
Columns that are not ours are carried to the summary. A mistake in what was asked as a whole (no such column, the same
``slide_id`` twice) is an error before anything runs. A mistake in one row, or a path that is not there, becomes a job
that carries its ``problem``: it fails in the summary and the others go on.
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
from maskattn.slide.manifest.rows import TableRows
from maskattn.slide.manifest.spreadsheet import read_records
from maskattn.slide.names import as_text, problem_of_id, shortened

__all__ = ["SLIDE_SUFFIXES", "SlideJob", "collect_jobs", "read_manifest"]

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
"""The kinds of files that are read as a manifest, and workbooks, for which the error says how to save them as one."""


def collect_jobs(
    sources: Sequence[str | Path], on_note: Callable[[str], None] | None = None, manifest: Path | None = None
) -> list[SlideJob]:
    """Jobs from slide paths, globs, folders (their own slides, not those of subfolders) and manifests, in order.

    A slide that two sources name is one job. A source that gives no slide, among others that do, is a job that fails.

    Args:
        sources: what the user named; ``.csv``, ``.tsv`` and ``.txt`` are manifests.
        on_note: called with a sentence on each thing skipped: other files of a folder, other columns of a manifest.
        manifest: one more manifest, whatever its ending; it must be one.

    Raises:
        ManifestError: nothing was named, no source gives a slide, two different slides have the same ``slide_id``, or
            ``manifest`` is none.
    """
    on_note = on_note or _keep_quiet
    matches = [match for source in sources for match in _matches_of(Path(source))]
    folders = [path for path in matches if is_folder(path)]
    rows, looked_in = ([], set[Path]()) if manifest is None else _read_table(manifest, on_note, folders)
    if not sources and not rows:
        raise ManifestError(
            "infer needs at least one slide, got none; name slide files, folders, globs or a CSV manifest"
        )
    named: dict[int, Sequence[SlideJob | Path]] = {}
    errors: list[ManifestError] = []
    # Tables first: they may say that a folder is where their slides lie, and no source.
    for index in sorted(range(len(matches)), key=lambda index: not _is_table(matches[index])):
        path = matches[index]
        try:
            if _is_table(path):
                named[index], places = _read_table(path, on_note, folders)
                looked_in |= places
            elif path not in looked_in:
                named[index] = _slides_of(path, on_note)
        except ManifestError as error:
            errors.append(error)
            named[index] = [SlideJob(shortened(path), path, problem=str(error))]
    slides = [slide for index in sorted(named) for slide in named[index]] + rows
    if len(errors) == len(slides):
        raise errors[0]
    ids = one_per_series([slide for slide in slides if isinstance(slide, Path)])
    jobs = (_job_of_path(slide, ids.get(slide)) if isinstance(slide, Path) else slide for slide in slides)
    return _unique(job for job in jobs if job is not None)


def read_manifest(
    path: Path, on_note: Callable[[str], None] | None = None, folders: Sequence[Path] = ()
) -> list[SlideJob]:
    """Jobs from a manifest, a row each; empty rows are left out.

    The table may be as a spreadsheet program or another tool saved it: with commas, semicolons or tabs, in UTF-8,
    UTF-16 or Windows' code page, with decimal commas, and with further columns.

    Args:
        path: of the table.
        on_note: called with a sentence on the columns that are copied to the summary, and on those that are skipped.
        folders: where slides lie, beside the table's own folder, that the table names by id or file alone.

    Raises:
        ManifestError: the file cannot be read, a column is missing or misspelt, it has no rows, or a ``slide_id`` comes
            twice.
    """
    return _read_table(path, on_note or _keep_quiet, folders)[0]


def _read_table(
    path: Path, on_note: Callable[[str], None], folders: Sequence[Path]
) -> tuple[list[SlideJob], set[Path]]:
    """The jobs of a table, and those of the folders that it takes for the places of its slides."""
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
    """For callers who want no notes."""


def _matches_of(source: Path) -> list[Path]:
    """What a source matches, where it is a glob; else itself."""
    return (match_glob(source) if _is_glob(source) else []) or [source]


def _is_glob(path: Path) -> bool:
    return glob.has_magic(os.fspath(path)) and not is_there(path)


def _slides_of(path: Path, on_note: Callable[[str], None]) -> Sequence[Path]:
    """The slides of a folder, or the path itself."""
    if is_folder(path):
        return _slides_of_folder(path, on_note)
    if _is_glob(path):
        raise ManifestError(
            f"a glob must match at least one file, got no match for {as_text(path)}; check the folder and quotes"
        )
    return [path]


def _is_table(path: Path) -> bool:
    """Whether a source is read as a manifest."""
    return path.suffix.lower() in _TABLE_SUFFIXES and not is_folder(path) and not _is_glob(path)


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
    """The job of a path that has no manifest; None where another file of its series has the id."""
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
                f"slide_id must be unique, got {job.slide_id!r} for both {as_text(other.path)} and "
                f"{as_text(job.path)}; give each an id of its own in a manifest (slide_id,slide_path)"
            )
        by_id[job.slide_id] = _merged(other, job)
    return list(by_id.values())


def _merged(one: SlideJob, other: SlideJob) -> SlideJob:
    """One slide that two sources name: what either says of it holds.

    Raises:
        ManifestError: they contradict each other.
    """
    for name in ("mask_path", "spacing_um"):
        said = {getattr(job, name) for job in (one, other)} - {None}
        if len(said) > 1:
            raise ManifestError(
                f"a slide that is named twice must have one {name}, got {' and '.join(sorted(map(str, said)))} for "
                f"{one.slide_id!r}; name it once"
            )
    return replace(
        one,
        mask_path=one.mask_path or other.mask_path,
        spacing_um=one.spacing_um or other.spacing_um,
        problem=one.problem or other.problem,
        carried=tuple((dict(other.carried) | dict(one.carried)).items()),
    )

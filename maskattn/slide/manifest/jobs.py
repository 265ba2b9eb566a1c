"""Manifest: what a user named (paths, globs, folders, tables) → one job per slide.

A table has a header ``slide_id,slide_path[,mask_path][,spacing_um]``; relative paths start at the table's own folder. A
mistake in what was asked as a whole (no such column, the same ``slide_id`` twice) is an error before anything runs. A
mistake in one row, or a path that is not there, becomes a job that carries its ``problem``: it fails in the summary and
the others go on.
"""

from __future__ import annotations

import glob
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maskattn.errors import ManifestError
from maskattn.slide.file_checks import is_folder, is_there, problem_of_file, same_file
from maskattn.slide.manifest.columns import is_known_column, last_named, locate_columns
from maskattn.slide.manifest.dicom_series import one_per_series
from maskattn.slide.manifest.folder_search import SLIDE_SUFFIXES, match_glob, search_folder
from maskattn.slide.manifest.spreadsheet import Record, read_records
from maskattn.slide.names import as_text, id_of_file, problem_of_id, shortened

__all__ = ["SLIDE_SUFFIXES", "SlideJob", "collect_jobs", "read_manifest"]

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
"""What is read as a manifest; of the workbooks it is told how to save them as one."""


@dataclass(frozen=True)
class SlideJob:
    """One slide to predict.

    Attributes:
        slide_id: names the slide's folder of outputs and its row of the summary.
        path: the slide file.
        mask_path: the user's own tissue mask; None = find the tissue.
        spacing_um: µm per level-0 pixel as the manifest has it; None = ask the file.
        problem: why this job cannot run, found while the jobs were collected; None = it can.
    """

    slide_id: str
    path: Path
    mask_path: Path | None = None
    spacing_um: float | None = None
    problem: str | None = None


def collect_jobs(
    sources: Sequence[str | Path], on_note: Callable[[str], None] | None = None, manifest: Path | None = None
) -> list[SlideJob]:
    """Jobs from slide paths, globs, folders (their own slides, not those of subfolders) and manifests, in order.

    A slide that two sources name is one job. A source that gives no slide, among others that do, is a job that fails.

    Args:
        sources: what the user named; ``.csv``, ``.tsv`` and ``.txt`` are manifests.
        on_note: told, a sentence each, of what was passed over: other files of a folder, other columns of a manifest.
        manifest: one more manifest, whatever its ending; it must be one.

    Raises:
        ManifestError: nothing was named, no source gives a slide, two different slides have the same ``slide_id``, or
            ``manifest`` is none.
    """
    on_note = on_note or _keep_quiet
    rows = [] if manifest is None else read_manifest(manifest, on_note)
    if not sources and not rows:
        raise ManifestError(
            "infer needs at least one slide, got none; name slide files, folders, globs or a CSV manifest"
        )
    named: list[SlideJob | Path] = []
    errors: list[ManifestError] = []
    for path in (match for source in sources for match in _matches_of(Path(source))):
        try:
            named += _slides_of(path, on_note)
        except ManifestError as error:
            errors.append(error)
            named.append(SlideJob(shortened(path), path, problem=str(error)))
    named += rows
    if len(errors) == len(named):
        raise errors[0]
    ids = one_per_series([slide for slide in named if isinstance(slide, Path)])
    jobs = (_job_of_path(slide, ids.get(slide)) if isinstance(slide, Path) else slide for slide in named)
    return _unique(job for job in jobs if job is not None)


def read_manifest(path: Path, on_note: Callable[[str], None] | None = None) -> list[SlideJob]:
    """Jobs from a manifest, a row each; empty rows are left out.

    The table may be as a spreadsheet program or another tool saved it: with commas, semicolons or tabs, in UTF-8,
    UTF-16 or Windows' code page, with decimal commas, and with further columns.

    Args:
        path: of the table.
        on_note: told of the columns that were passed over.

    Raises:
        ManifestError: the file cannot be read, a column is missing or misspelt, it has no rows, or a ``slide_id`` comes
            twice.
    """
    records = read_records(path, is_known_column)
    columns, others = locate_columns(records[0].fields if records else (), path)
    if others and on_note is not None:
        names = ", ".join(map(as_text, others))
        on_note(f"in {as_text(path)}, passed over the column{'' if len(others) == 1 else 's'} {names}")
    jobs = [_job_of_record(path, record, columns, last_named(records[0].fields) + 1) for record in records[1:]]
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
    return jobs


def _keep_quiet(note: str) -> None:
    """For callers who want no notes."""


def _matches_of(source: Path) -> list[Path]:
    """What a source matches, where it is a glob; else itself."""
    return (match_glob(source) if _is_glob(source) else []) or [source]


def _is_glob(path: Path) -> bool:
    return glob.has_magic(os.fspath(path)) and not is_there(path)


def _slides_of(path: Path, on_note: Callable[[str], None]) -> Sequence[SlideJob | Path]:
    """The slides of a folder, the jobs of a manifest, or the path itself."""
    if is_folder(path):
        return _slides_of_folder(path, on_note)
    if _is_glob(path):
        raise ManifestError(
            f"a glob must match at least one file, got no match for {as_text(path)}; check the folder and quotes"
        )
    if path.suffix.lower() in _TABLE_SUFFIXES:
        return read_manifest(path, on_note)
    return [path]


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


def _job_of_record(manifest: Path, record: Record, columns: Mapping[str, int], width: int) -> SlideJob:
    """The job of one row; missing fields are empty, and so must be those beyond the header's last name."""
    cells = {name: record.fields[index] if index < len(record.fields) else "" for name, index in columns.items()}
    where = f"line {record.line} of {as_text(manifest.name)}"
    path = _path_of(manifest, cells.get("slide_path", ""))
    mask_path = _path_of(manifest, cells["mask_path"]) if cells.get("mask_path") else None
    spacing_um, problem = _read_spacing(cells.get("spacing_um", ""), where)
    slide_id = cells["slide_id"] if "slide_id" in columns else id_of_file(path)
    if record.problem is not None:
        problem = f"{record.problem} in {where}"
    elif any(record.fields[width:]):
        problem = f"a row must have the header's fields, got more in {where}; quote a path that holds a comma"
    elif not slide_id and "slide_id" in columns:
        problem = f"a row must have a slide_id, got none in {where}"
    elif not cells["slide_path"]:
        problem = f"a row must have a slide_path, got none in {where}"
    problem = problem or problem_of_file(path, "slide", where)
    if mask_path is not None:
        problem = problem or problem_of_file(mask_path, "mask", where)
    slide_id = slide_id or f"line-{record.line}"
    return SlideJob(shortened(slide_id), path, mask_path, spacing_um, problem or problem_of_id(slide_id))


def _path_of(manifest: Path, cell: str) -> Path:
    """The path as the disk spells it: as written, or with other slashes, accents or code page where that is there."""
    spellings = [cell]
    if not cell.isascii():
        spellings += [unicodedata.normalize(form, cell) for form in ("NFC", "NFD")]
        spellings += [os.fsdecode(cell.encode("cp1252", "replace"))]
    if "\\" in cell:
        spellings += [spelling.replace("\\", "/") for spelling in spellings]
    for spelling in spellings[1:]:
        if not is_there(manifest.parent / cell) and is_there(manifest.parent / spelling):
            return manifest.parent / spelling
    return manifest.parent / cell


def _read_spacing(text: str, where: str) -> tuple[float | None, str | None]:
    if not text:
        return None, None
    try:
        spacing_um = float(text.replace(",", ".") if text.count(",") == 1 else text)
    except ValueError:
        spacing_um = math.nan
    if math.isfinite(spacing_um) and spacing_um > 0:
        return spacing_um, None
    return None, f"spacing_um must be a positive number of µm per pixel, got {shortened(text)!r} in {where}"


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
    )

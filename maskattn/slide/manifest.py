"""Manifest: what a user named (paths, globs, folders, a CSV) → one job per slide.

The CSV has a header ``slide_id,slide_path[,mask_path][,spacing_um]``; relative paths start at the CSV's own folder.
A mistake in what was asked as a whole (no such column, the same ``slide_id`` twice) is an error before anything runs.
A mistake in one row, or a path that is not there, becomes a job that carries its ``problem``: it fails in the summary
and the others go on.
"""

from __future__ import annotations

import csv
import glob
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskattn.errors import ManifestError

__all__ = ["SLIDE_SUFFIXES", "SlideJob", "collect_jobs", "read_manifest"]

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide")
"""What a folder is searched for. DICOM slides are many files each: name one of them instead of the folder."""

_REQUIRED_COLUMNS = ("slide_id", "slide_path")
_OPTIONAL_COLUMNS = ("mask_path", "spacing_um")


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


def collect_jobs(sources: Sequence[str | Path]) -> list[SlideJob]:
    """Jobs from slide paths, globs, folders (their own slides, not those of subfolders) and CSV manifests, in order.

    A slide that two sources name is one job.

    Raises:
        ManifestError: nothing was named, a glob or folder holds no slide, a manifest is malformed, or two different
            slides have the same ``slide_id``.
    """
    if not sources:
        raise ManifestError(
            "infer needs at least one slide, got none; name slide files, folders, globs or a CSV manifest"
        )
    jobs: list[SlideJob] = []
    for source in sources:
        path = Path(source)
        if path.suffix.lower() == ".csv":
            jobs += read_manifest(path)
        else:
            jobs += [_job_of_path(found) for found in _expand(path)]
    return _unique(jobs)


def read_manifest(path: Path) -> list[SlideJob]:
    """Jobs from a CSV manifest, a row each; empty lines are passed over.

    Raises:
        ManifestError: the file cannot be read, a column is missing or unknown, it has no rows, or a ``slide_id`` comes
            twice.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _check_columns(path, [name.strip() for name in reader.fieldnames or []])
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            jobs = [_job_of_row(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"a manifest must be a readable CSV text, got {path}: {error}") from error
    if not jobs:
        raise ManifestError(f"a manifest must have at least one row below its header, got none in {path}")
    seen: set[str] = set()
    for job in jobs:
        if job.slide_id in seen:
            raise ManifestError(
                f"slide_id must be unique, got {job.slide_id!r} twice in {path}; give each slide an id of its own"
            )
        seen.add(job.slide_id)
    return jobs


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SLIDE_SUFFIXES and entry.is_file())
        if not found:
            raise ManifestError(
                f"a folder must hold slides ({', '.join(SLIDE_SUFFIXES)}), got none in {path}; name the files"
            )
        return found
    if not path.exists() and glob.has_magic(str(path)):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not found:
            raise ManifestError(
                f"a glob must match at least one file, got no match for {path}; check the folder and quotes"
            )
        return found
    return [path]


def _job_of_path(path: Path) -> SlideJob:
    problem = None if path.is_file() else f"a slide must be a file, got {path}, which does not exist; check the path"
    return SlideJob(path.stem, path, problem=problem or _problem_of_id(path.stem))


def _check_columns(path: Path, columns: list[str]) -> None:
    missing = [name for name in _REQUIRED_COLUMNS if name not in columns]
    unknown = [name for name in columns if name not in _REQUIRED_COLUMNS + _OPTIONAL_COLUMNS]
    if missing or unknown or len(set(columns)) != len(columns):
        raise ManifestError(
            f"a manifest must have the columns slide_id, slide_path and may have mask_path, spacing_um, each once; got "
            f"{', '.join(columns) or 'no header'} in {path}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )


def _job_of_row(manifest: Path, line: int, row: dict[str | None, str | list[str] | None]) -> SlideJob:
    """The job of one row, as csv gives it: fields beyond the header's under None, missing ones as None."""
    cells = {
        name: (value or "").strip() for name, value in row.items() if name is not None and not isinstance(value, list)
    }
    where = f"line {line} of {manifest.name}"
    slide_id = cells["slide_id"] or f"line-{line}"
    path = manifest.parent / cells["slide_path"]
    mask_path = manifest.parent / cells["mask_path"] if cells.get("mask_path") else None
    spacing_um, problem = _read_spacing(cells.get("spacing_um", ""), where)
    if None in row:
        problem = f"a row must have the header's fields, got more in {where}; quote a path that holds a comma"
    elif not cells["slide_id"]:
        problem = f"a row must have a slide_id, got none in {where}"
    elif not cells["slide_path"]:
        problem = f"a row must have a slide_path, got none in {where}"
    elif not path.is_file():
        problem = f"a slide must be a file, got {path} in {where}, which does not exist; check the path"
    elif mask_path is not None and not mask_path.is_file():
        problem = f"a mask must be a file, got {mask_path} in {where}, which does not exist; check the path"
    return SlideJob(slide_id, path, mask_path, spacing_um, problem or _problem_of_id(slide_id))


def _read_spacing(text: str, where: str) -> tuple[float | None, str | None]:
    if not text:
        return None, None
    try:
        spacing_um = float(text)
    except ValueError:
        spacing_um = math.nan
    if math.isfinite(spacing_um) and spacing_um > 0:
        return spacing_um, None
    return None, f"spacing_um must be a positive number of µm per pixel, got {text!r} in {where}"


def _problem_of_id(slide_id: str) -> str | None:
    """Why an id cannot name a folder, or None. A leading dot is ours: it marks what is not finished."""
    if any(sign in slide_id for sign in "/\\\0\n\r") or slide_id.startswith(".") or len(slide_id.encode()) > 200:
        return (
            f"a slide_id must name a folder (no / or \\, no leading dot, at most 200 bytes), got {slide_id!r}; "
            "give it another in a manifest"
        )
    return None


def _unique(jobs: Iterable[SlideJob]) -> list[SlideJob]:
    by_id: dict[str, SlideJob] = {}
    for job in jobs:
        other = by_id.setdefault(job.slide_id, job)
        if other.path.resolve() != job.path.resolve():
            raise ManifestError(
                f"slide_id must be unique, got {job.slide_id!r} for both {other.path} and {job.path}; "
                "give each an id of its own in a manifest (slide_id,slide_path)"
            )
    return list(by_id.values())

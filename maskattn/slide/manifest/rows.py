"""Turn the rows of a manifest into jobs. A mistake in a row becomes its job's problem, and the others run."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from maskattn.slide.file_checks import is_there, problem_of_file
from maskattn.slide.manifest.columns import Columns
from maskattn.slide.manifest.folder_search import SLIDE_SUFFIXES
from maskattn.slide.manifest.job import SlideJob
from maskattn.slide.manifest.named_slides import NamedSlides, id_of_features
from maskattn.slide.manifest.spreadsheet import Record
from maskattn.slide.names import as_text, id_of_file, problem_of_id, shortened
from maskattn.slide.remote.files import RemoteFile, problem_of_url
from maskattn.slide.remote.urls import is_url, path_of_url

__all__ = ["TableRows"]


class TableRows:
    """Makes the jobs of a table's rows.

    Args:
        manifest: the path of the table.
        columns: the positions of its columns.
        width: the number of fields that a row may have.
        folders: further folders to search for slides that the table names only by id or file name.
    """

    def __init__(self, manifest: Path, columns: Columns, width: int, folders: Sequence[Path]) -> None:
        self._manifest, self._columns, self._width = manifest, columns, width
        self._folders = folders if columns.by_name else ()
        self._named = NamedSlides([manifest.parent, *self._folders])
        self._with_paths = "slide_path" in columns.ours
        self.looked_in: set[Path] = set() if self._with_paths else set(self._folders)
        """The folders that are searched for the table's slides."""

    def job(self, record: Record) -> SlideJob:
        """Return the job of a row; missing fields count as empty, and fields beyond the header's last name must be."""
        where = f"line {record.line} of {as_text(self._manifest.name)}"
        cells = {name: _field(record, index) for name, index in self._columns.ours.items()}
        problem: str | None
        if record.problem is not None:
            problem = f"{record.problem} in {where}"
        elif any(record.fields[self._width :]):
            problem = f"a row must have the header's fields, got more in {where}; quote a path that holds a comma"
        else:
            problem = None
        slide_id, path, lack = self._slide(cells, where)
        mask_path = _path_of(self._manifest.parent, cells["mask_path"]) if cells.get("mask_path") else None
        spacing_um, wrong_spacing = _read_spacing(cells.get("spacing_um", ""), where)
        origin, mask_origin = _remote(cells.get("slide_path", "")), _remote(cells.get("mask_path", ""))
        problem = problem or lack or wrong_spacing
        problem = problem or (problem_of_file(path, "slide", where) if origin is None else problem_of_url(origin.url))
        if mask_path is not None and mask_origin is None:
            problem = problem or problem_of_file(mask_path, "mask", where)
        slide_id = slide_id or f"line-{record.line}"
        carried = tuple((name, _field(record, index)) for name, index in self._columns.carried.items())
        problem = problem or problem_of_id(slide_id)
        return SlideJob(shortened(slide_id), path, mask_path, spacing_um, problem, carried, origin, mask_origin)

    def _slide(self, cells: Mapping[str, str], where: str) -> tuple[str, Path, str | None]:
        """Return the id and the file of a row's slide, and what the row lacks or None."""
        slide_id, lack = cells.get("slide_id", ""), None
        if "slide_id" in cells and not slide_id:
            lack = f"a row must have a slide_id, got none in {where}"
        if self._with_paths:
            path = self._placed(cells["slide_path"])
            if not cells["slide_path"]:
                lack = lack or f"a row must have a slide_path, got none in {where}"
            return (slide_id if "slide_id" in cells else id_of_file(path)), path, lack
        name = id_of_features(cells["slide_file"]) if cells.get("slide_file") else slide_id
        if not name:
            told = "a FILENAME" if "slide_file" in cells else "a slide_id"
            return slide_id, self._manifest.parent, lack or f"a row must have {told}, got none in {where}"
        path, missing = self._named.find(name, where)
        slide_id = slide_id or PurePosixPath(name).name
        # CLAM's ids may have the file's ending, which its outputs have not.
        if os.path.splitext(slide_id)[1].lower() in SLIDE_SUFFIXES:
            slide_id = id_of_file(slide_id)
        return slide_id, path, lack or missing

    def _placed(self, cell: str) -> Path:
        """A path from the table's own folder, or from the first named beside it that has the file."""
        path = _path_of(self._manifest.parent, cell)
        if cell and not is_url(cell) and not is_there(path):
            for folder in self._folders:
                other = _path_of(folder, cell)
                if is_there(other):
                    self.looked_in.add(folder)
                    return other
        return path


def _field(record: Record, index: int) -> str:
    return record.fields[index] if index < len(record.fields) else ""


def _path_of(folder: Path, cell: str) -> Path:
    """The path as the disk spells it: as written, or with other slashes, accents or code page where that is there."""
    if is_url(cell):
        return path_of_url(cell)
    spellings = [cell]
    if not cell.isascii():
        spellings += [unicodedata.normalize(form, cell) for form in ("NFC", "NFD")]
        spellings += [os.fsdecode(cell.encode("cp1252", "replace"))]
    if "\\" in cell:
        spellings += [spelling.replace("\\", "/") for spelling in spellings]
    for spelling in spellings[1:]:
        if not is_there(folder / cell) and is_there(folder / spelling):
            return folder / spelling
    return folder / cell


def _remote(cell: str) -> RemoteFile | None:
    return RemoteFile(cell) if is_url(cell) else None


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

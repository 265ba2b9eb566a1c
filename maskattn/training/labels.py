"""Labels of slides: what a table says of each slide and its patient.

A row is a slide, or a patient where a second table says which slides a patient has. Columns have the names of the
manifests that :mod:`maskattn.slide.manifest` reads, or CLAM's (``case_id``), STAMP's (``PATIENT``, ``FILENAME``) and
TRIDENT's (``wsi``). The column that is predicted is named by the user.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from maskattn.slide.manifest.spreadsheet import Record, read_records
from maskattn.slide.names import as_text

__all__ = ["SlideLabel", "SlideLabels", "read_labels"]

_SLIDE = ("slideid", "sampleid", "filename", "wsi", "slide", "imageid")
_PATIENT = ("patientid", "caseid", "patient", "case", "submitterid")
_ENDINGS = (".h5", ".hdf5", ".pt", ".npz", ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".czi")
_MISSING = ("", "nan", "na", "n/a", "none", "null", "-", "?")


@dataclass(frozen=True)
class SlideLabel:
    """A row of the labels.

    Attributes:
        slide_id: the slide's id, as its features' file has it.
        patient_id: the patient's; the slide's own where the table has none.
        values: the asked columns → what the row says, as text; None where it says nothing.
    """

    slide_id: str
    patient_id: str
    values: dict[str, str | None]


@dataclass(frozen=True)
class SlideLabels:
    """The labels of a cohort.

    Attributes:
        rows: a row for each slide, in the table's order.
        columns: the asked columns.
        source: the table.
        by_patient: whether the table has patients of its own.
    """

    rows: tuple[SlideLabel, ...]
    columns: tuple[str, ...]
    source: Path
    by_patient: bool

    def without_label(self) -> list[str]:
        """Ids of the slides of which an asked column says nothing."""
        return [row.slide_id for row in self.rows if None in row.values.values()]


def read_labels(path: Path, columns: Sequence[str], slide_table: Path | None = None) -> SlideLabels:
    """Read a table of labels.

    Args:
        path: a CSV text, as a spreadsheet program saves it.
        columns: the columns that are asked for, by their names in the table.
        slide_table: which slides a patient has: a table with columns of slides and of patients.

    Raises:
        ValueError: a column is not there (what there is, is said), a slide comes twice, or there are no rows.
    """
    header, records = _table(path, columns)
    slide, patient = _place(header, _SLIDE), _place(header, _PATIENT)
    places = {name: _column(header, name, path) for name in columns}
    if slide is None and slide_table is None:
        raise ValueError(
            f"labels must have a column slide_id, got {_there(header)} in {as_text(path)}; name it so, or give the "
            "slides of each patient in a table of their own (--slide-table)"
        )
    if slide_table is None:
        assert slide is not None, "a table without slides needs a second one"
        found = [(_id(_cell(one, slide)), _cell(one, patient), one) for one in records]
    else:
        if patient is None:
            raise ValueError(
                f"labels beside a --slide-table must have a column patient_id, got {_there(header)} in {as_text(path)}"
            )
        found = _joined(path, records, patient, slide_table)
    rows = [
        SlideLabel(
            slide_id,
            patient_id or slide_id,
            {name: _value(_cell(one, place)) for name, place in places.items()},
        )
        for slide_id, patient_id, one in found
    ]
    _check_rows(rows, slide_table or path)
    return SlideLabels(tuple(rows), tuple(columns), path, patient is not None)


def _table(path: Path, wanted: Sequence[str]) -> tuple[tuple[str, ...], list[Record]]:
    known = {*_SLIDE, *_PATIENT, *map(_plain, wanted)}
    records = read_records(path, lambda name: _plain(name) in known, "a table of labels")
    broken = [f"line {one.line}: {one.problem}" for one in records if one.problem]
    if broken:
        raise ValueError(f"a table of labels must be whole, got {'; '.join(broken[:3])} in {as_text(path)}")
    if len(records) < 2:
        raise ValueError(f"a table of labels must have a header and rows, got none in {as_text(path)}")
    return records[0].fields, records[1:]


def _joined(path: Path, records: list[Record], patient: int, slide_table: Path) -> list[tuple[str, str, Record]]:
    """The slides of each patient of the labels."""
    header, slides = _table(slide_table, ())
    slide, owner = _place(header, _SLIDE), _place(header, _PATIENT)
    if slide is None or owner is None:
        raise ValueError(
            f"a --slide-table must have the columns patient_id and slide_id (or FILENAME), got {_there(header)} in "
            f"{as_text(slide_table)}"
        )
    of_patient: dict[str, Record] = {}
    for one in records:
        name = _cell(one, patient)
        if name in of_patient:
            raise ValueError(
                f"a patient must have one row of labels, got two of {name!r} in {as_text(path)}; keep one, or leave "
                "--slide-table out and name a slide in each row"
            )
        of_patient[name] = one
    return [
        (_id(_cell(one, slide)), _cell(one, owner), of_patient[_cell(one, owner)])
        for one in slides
        if _cell(one, owner) in of_patient
    ]


def _check_rows(rows: list[SlideLabel], path: Path) -> None:
    if not rows:
        raise ValueError(f"labels must be of at least one slide, got none in {as_text(path)}; are the ids the same?")
    seen: set[str] = set()
    for row in rows:
        if not row.slide_id:
            raise ValueError(f"a row of labels must name its slide, got an empty one in {as_text(path)}")
        if row.slide_id in seen:
            raise ValueError(f"a slide must have one row of labels, got two of {row.slide_id!r} in {as_text(path)}")
        seen.add(row.slide_id)


def _column(header: Sequence[str], name: str, path: Path) -> int:
    """The index of a column that the user named.

    Raises:
        ValueError: there is none, or there are several.
    """
    exact = [place for place, other in enumerate(header) if other == name]
    alike = exact or [place for place, other in enumerate(header) if _plain(other) == _plain(name)]
    if len(alike) != 1:
        near = difflib.get_close_matches(name, header, 1)
        hint = f"; do you mean {near[0]!r}?" if near and not alike else ""
        raise ValueError(
            f"labels must have the column {name!r} {'once' if alike else ''}".rstrip()
            + f", got {_there(header)} in {as_text(path)}{hint}"
        )
    return alike[0]


def _place(header: Sequence[str], names: Sequence[str]) -> int | None:
    """The column of the first of some names that the header has."""
    plain = [_plain(name) for name in header]
    return next((plain.index(name) for name in names if name in plain), None)


def _cell(record: Record, place: int | None) -> str:
    return record.fields[place] if place is not None and place < len(record.fields) else ""


def _value(text: str) -> str | None:
    return None if text.casefold() in _MISSING else text


def _id(name: str) -> str:
    """The slide that a cell names: by its id, or by the file of its features or its own."""
    last = PurePosixPath(name.replace("\\", "/")).name
    ending = next((ending for ending in _ENDINGS if last.lower().endswith(ending)), "")
    return last[: len(last) - len(ending)]


def _there(header: Sequence[str]) -> str:
    return f"the columns {', '.join(name or '(no name)' for name in header)}"


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())

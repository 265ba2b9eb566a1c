"""Labels of slides, read from a table.

A row is a slide, or a patient if a second table lists each patient's slides. Columns have the names of the manifests
that :mod:`maskattn.slide.manifest` reads, or those of CLAM (``case_id``), STAMP (``PATIENT``, ``FILENAME``) and TRIDENT
(``wsi``). The user names the column of the target.
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
        slide_id: the slide's id, as in the name of its feature file.
        patient_id: the patient's id; the slide's if the table has no patients.
        values: requested column → text of its cell; None if it is empty or means "missing".
    """

    slide_id: str
    patient_id: str
    values: dict[str, str | None]


@dataclass(frozen=True)
class SlideLabels:
    """The labels of a cohort.

    Attributes:
        rows: a row for each slide, in the table's order.
        columns: the requested columns.
        source: the path of the table.
        by_patient: whether the table has a column of patients.
    """

    rows: tuple[SlideLabel, ...]
    columns: tuple[str, ...]
    source: Path
    by_patient: bool

    def without_label(self) -> list[str]:
        """Return the ids of the slides that lack a value in a requested column."""
        return [row.slide_id for row in self.rows if None in row.values.values()]


def read_labels(path: Path, columns: Sequence[str], slide_table: Path | None = None) -> SlideLabels:
    """Read a table of labels.

    Args:
        path: a CSV file, as spreadsheet programs save it.
        columns: the requested columns, by their names in the table.
        slide_table: a table with a column of slides and one of patients, if the labels have only patients.

    Raises:
        ValueError: a column is missing (the error lists those that exist), a slide occurs twice, or there are no rows.
    """
    header, records = _table(path, columns)
    slide, patient = _known_column(header, _SLIDE), _known_column(header, _PATIENT)
    positions = {name: _column(header, name, path) for name in columns}
    if slide is None and slide_table is None:
        raise ValueError(
            f"labels must have a column slide_id, got {_shown(header)} in {as_text(path)}; rename it, or give the "
            "slides of each patient in a second table (--slide-table)"
        )
    if slide_table is None:
        assert slide is not None, "a table without slides needs a second one"
        found = [(_id(_cell(one, slide)), _cell(one, patient), one) for one in records]
    else:
        if patient is None:
            raise ValueError(
                f"labels with a --slide-table must have a column patient_id, got {_shown(header)} in {as_text(path)}"
            )
        found = _joined(path, records, patient, slide_table)
    rows = [
        SlideLabel(
            slide_id,
            patient_id or slide_id,
            {name: _value(_cell(one, position)) for name, position in positions.items()},
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
        raise ValueError(f"a table of labels must be well-formed, got {'; '.join(broken[:3])} in {as_text(path)}")
    if len(records) < 2:
        raise ValueError(f"a table of labels must have a header and rows, got none in {as_text(path)}")
    return records[0].fields, records[1:]


def _joined(path: Path, records: list[Record], patient: int, slide_table: Path) -> list[tuple[str, str, Record]]:
    """Return (slide id, patient id, row of labels) for each slide of the labels' patients."""
    header, slides = _table(slide_table, ())
    slide, owner = _known_column(header, _SLIDE), _known_column(header, _PATIENT)
    if slide is None or owner is None:
        raise ValueError(
            f"a --slide-table must have the columns patient_id and slide_id (or FILENAME), got {_shown(header)} in "
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
        raise ValueError(f"labels must have at least one slide, got none in {as_text(path)}; are the ids the same?")
    seen: set[str] = set()
    for row in rows:
        if not row.slide_id:
            raise ValueError(f"a row of labels must name its slide, got an empty one in {as_text(path)}")
        if row.slide_id in seen:
            raise ValueError(f"a slide must have one row of labels, got two of {row.slide_id!r} in {as_text(path)}")
        seen.add(row.slide_id)


def _column(header: Sequence[str], name: str, path: Path) -> int:
    """Return the index of a column that the user named.

    Raises:
        ValueError: there is none, or there are several.
    """
    exact = [position for position, other in enumerate(header) if other == name]
    alike = exact or [position for position, other in enumerate(header) if _plain(other) == _plain(name)]
    if len(alike) != 1:
        near = difflib.get_close_matches(name, header, 1)
        hint = f"; do you mean {near[0]!r}?" if near and not alike else ""
        raise ValueError(
            f"labels must have the column {name!r} {'once' if alike else ''}".rstrip()
            + f", got {_shown(header)} in {as_text(path)}{hint}"
        )
    return alike[0]


def _known_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the index of the first of some names that the header has; None if it has none of them."""
    plain = [_plain(name) for name in header]
    return next((plain.index(name) for name in names if name in plain), None)


def _cell(record: Record, position: int | None) -> str:
    return record.fields[position] if position is not None and position < len(record.fields) else ""


def _value(text: str) -> str | None:
    return None if text.casefold() in _MISSING else text


def _id(name: str) -> str:
    """Return the id of the slide that a cell names, by its id or by the path of its feature or slide file."""
    last = PurePosixPath(name.replace("\\", "/")).name
    ending = next((ending for ending in _ENDINGS if last.lower().endswith(ending)), "")
    return last[: len(last) - len(ending)]


def _shown(header: Sequence[str]) -> str:
    return f"the columns {', '.join(name or '(no name)' for name in header)}"


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())

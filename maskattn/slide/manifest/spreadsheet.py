"""Spreadsheet: the records of a table as text, however a spreadsheet program saved it.

Encodings: UTF-8 and UTF-16, with or without a mark, and Windows' Western code page, line by line, so that one strange
name does not garble the others. Fields are parted by commas, semicolons, tabs or bars: by the one that makes the most
of the header. Lines end as they do on any system.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from maskattn.errors import ManifestError
from maskattn.slide.names import as_text

__all__ = ["Record", "read_records"]

_DELIMITERS = ",;\t|"
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# The first bytes of what people have in place of a text: .xlsx and .ods are zip archives, .xls an OLE file.
_NO_TEXTS = {b"PK\x03\x04": "a workbook", b"\xd0\xcf\x11\xe0": "a workbook", b"%PDF": "a PDF"}
_NO_TEXTS |= dict.fromkeys((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+", b"\x89PNG", b"\xff\xd8\xff"), "an image")
_MOST_LINES_PER_RECORD = 50
_SPACE = " \t\r\n\u00a0\u2007\u202f\u200b\u200e\u200f\ufeff"


@dataclass(frozen=True)
class Record:
    """One record of a table.

    Attributes:
        line: where it starts, from 1.
        fields: its fields, less the space around them; empty where it has a problem.
        problem: why it cannot be taken apart, or None.
    """

    line: int
    fields: tuple[str, ...]
    problem: str | None = None


def read_records(path: Path, is_known: Callable[[str], bool], what: str = "a manifest") -> list[Record]:
    """The records of a table, the header first; blank ones are left out.

    Args:
        path: the table.
        is_known: whether a column's name is one that the reader of the table uses. The delimiter that finds the most
            of them is the table's, and their fields have one line each: a quoted field of several is for others.
        what: the table, as messages call it.

    Raises:
        ManifestError: the file cannot be read, or is not text.
    """
    lines = _read_lines(path, what)
    stated = re.fullmatch(r'"?sep=(.)"?', lines[0].strip(_SPACE.replace("\t", "")), re.IGNORECASE)
    index = 1 if stated else 0
    while index < len(lines) and not lines[index].strip(_SPACE + _DELIMITERS + '"'):
        index += 1
    if index == len(lines):
        return []
    headers = {sign: _record_at(lines, index, sign) for sign in (stated[1] if stated else _DELIMITERS)}
    delimiter = max(headers, key=lambda sign: sum(map(is_known, headers[sign][0].fields)))
    records = []
    known: frozenset[int] = frozenset()
    while index < len(lines):
        record, taken = _record_at(lines, index, delimiter, known)
        known = known or frozenset(column for column, name in enumerate(record.fields) if is_known(name))
        if record.problem or any(record.fields):
            records.append(record)
        index += taken
    return records


def _read_lines(path: Path, what: str) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"{what} must be a readable CSV text, got {as_text(path)}: {error.strerror or error}"
        ) from error
    kind = next((kind for start, kind in _NO_TEXTS.items() if data.startswith(start)), None)
    if kind is not None:
        raise ManifestError(
            f"{what} must be a readable CSV text, got {kind} in {as_text(path)}; save the table as "
            "CSV UTF-8 (comma delimited)"
        )
    return re.split(r"\r\n|\r|\n", _decoded(data, path, what))


def _decoded(data: bytes, path: Path, what: str) -> str:
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark)
    if encoding is None and len(data) > 1 and (data[1] == 0) != (data[0] == 0):
        encoding = "utf-16-le" if data[1] == 0 else "utf-16-be"
    if encoding is None or encoding == "utf-8":
        # bytes.splitlines splits at the three line ends of CSV and at no others.
        return "".join(map(_line_decoded, data[len(mark) :].splitlines(keepends=True)))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{what} must be a readable CSV text, got {as_text(path)}, which starts as {encoding.upper()} does: "
            f"{error.reason}; save the table as CSV UTF-8 (comma delimited)"
        ) from error


def _line_decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        try:
            return line.decode("cp1252")
        except UnicodeDecodeError:
            return line.decode("latin-1")


def _record_at(
    lines: Sequence[str], index: int, delimiter: str, known: frozenset[int] = frozenset()
) -> tuple[Record, int]:
    """Return the record that starts on a line, and the number of its lines."""
    window = range(index, min(index + _MOST_LINES_PER_RECORD, len(lines)))
    # An extra empty line: csv reads it only if a quote is still open, which is no error for csv itself.
    text = chain((f"{lines[number]}\n" for number in window), ("",))
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
    try:
        fields = next(reader, [])
    except csv.Error as error:
        return Record(index + 1, (), f"a row must be a line of CSV, got {error}"), 1
    taken = reader.line_num
    if taken > len(window) or (taken > 1 and any("\n" in fields[column] for column in known if column < len(fields))):
        return Record(index + 1, (), 'a row must close the quotes (") that it opens, got one that is open'), 1
    return Record(index + 1, tuple(field.strip(_SPACE) for field in fields)), taken

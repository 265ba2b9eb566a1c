"""``summary.csv``: one row with the outcome of each slide, readable at any time during a run.

A slide's row is appended when the slide ends, at a cost that does not depend on the length of the table. The table is
rewritten only if a row has a new column, and at the end of a run; until then a slide may have several rows, of which
the last counts. Several processes may write to the table: each opens the file for one row, and ``fleet/rows.py``
ensures that only one does so at a time.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path

from maskattn.errors import OutputError
from maskattn.files import replacing
from maskattn.slide.names import as_text

__all__ = ["append_row", "carried_into", "read_summary", "summary_errors", "tidy_summary", "write_summary"]

_FIRST_COLUMNS = ("slide_id", "status", "reason", "prediction")
_LAST_COLUMNS = ("model", "seconds")
_OTHER_COLUMNS = ("map_check",)


def read_summary(path: Path) -> dict[str, dict[str, str]]:
    """Read the last row of each slide from a ``summary.csv``, by ``slide_id`` and in order; empty without a file.

    Raises:
        ValueError: the file is not a summary.
        OSError: the file cannot be read.
    """
    return {row["slide_id"]: row for row in _read_rows(path)}


def write_summary(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write the entire ``summary.csv``, with a ``score_<class>`` column for every class that occurs.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [_in_one_line(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    scores = [name for name in names if name.startswith("score_")]
    columns = [*_FIRST_COLUMNS, *scores, *_LAST_COLUMNS]
    columns += [name for name in names if name not in columns]
    if "encoder" in names and not any(row.get("prediction") for row in rows):
        columns = [name for name in columns if name not in ("prediction", "model")]  # an extraction predicts nothing
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def carried_into(row: Mapping[str, str], carried: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return a slide's row with the manifest's additional columns, each under its own name.

    A column with the name of a column of the summary becomes ``manifest_<name>``.
    """
    ours = {*_FIRST_COLUMNS, *_LAST_COLUMNS, *_OTHER_COLUMNS, *row}
    named = {
        f"manifest_{name}" if name in ours or name.startswith("score_") else name: value for name, value in carried
    }
    return {**row, **named}


def append_row(path: Path, row: Mapping[str, str]) -> None:
    """Add a slide's row to the summary; it replaces the slide's earlier rows.

    Raises:
        ValueError: the file is not a summary.
        OSError: the file cannot be read or written.
    """
    row = _in_one_line(row)
    try:
        with path.open("r+b", buffering=0) as file:
            appended = _append(file, row)
    except (FileNotFoundError, PermissionError):
        appended = False
    if not appended:
        write_summary(path, {**read_summary(path), row["slide_id"]: row}.values())


def tidy_summary(path: Path) -> None:
    """Remove all but the last row of each slide.

    Raises:
        ValueError: the file is not a summary.
        OSError: the file cannot be read or written.
    """
    rows = _read_rows(path)
    latest = {row["slide_id"]: row for row in rows}
    if len(latest) < len(rows):
        write_summary(path, latest.values())


@contextlib.contextmanager
def summary_errors(path: Path) -> Iterator[None]:
    """Raise errors of the summary within the context as an :class:`OutputError` with a remedy."""
    try:
        yield
    except OutputError:
        raise
    except ValueError as error:
        raise OutputError(str(error)) from error
    except OSError as error:
        raise OutputError(
            f"the summary must be a readable and writable file, got {as_text(path)}: {error.strerror or error}; free "
            "space or move it away and run again, finished slides are skipped"
        ) from error


def _append(file: FileIO, row: Mapping[str, str]) -> bool:
    """Append a row, and return whether that was possible; otherwise the table must be rewritten."""
    columns = next(csv.reader([file.readline().decode("utf-8-sig", "replace")]), [])
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if not row.keys() <= set(columns) or file.read() != b"\n":
        return False
    line = io.StringIO()
    csv.DictWriter(line, columns, restval="", lineterminator="\n").writerow(row)
    left = line.getvalue().encode()
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        # If the disk is full, half a row would garble the rows after it.
        os.ftruncate(file.fileno(), size)
        raise
    return True


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Read all rows, including replaced ones; an incomplete last row of a killed run is dropped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        lines, end, tail = data.rpartition(b"\n")
        text = ((lines + end).decode() + tail.decode("utf-8", "replace")).removeprefix("\ufeff")
        header, *table = csv.reader(io.StringIO(text, newline=""))
    except (ValueError, csv.Error):
        header, table = [], []
    if header[:3] != list(_FIRST_COLUMNS[:3]):
        raise ValueError(
            f"a summary must be a CSV file with the columns slide_id, status, reason, ..., got {header or 'none'} in "
            f"{as_text(path)}; move that file away or choose another output folder"
        )
    if tail and table and len(table[-1]) < len(header):
        table.pop()
    blank = [""] * len(header)
    return [dict(zip(header, [*fields, *blank], strict=False)) for fields in table if fields]


def _in_one_line(row: Mapping[str, str]) -> dict[str, str]:
    """Return the row without line breaks and undecodable text, so that an incomplete row is one without a line end."""
    return {as_text(name): as_text(value) for name, value in row.items()}

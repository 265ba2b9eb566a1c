"""``summary.csv``: the outcome of every slide in a row of its own, readable at any moment of a run.

A slide's row is appended when it ends, so that a row costs the same however long the table is. The table is written
anew, whole, only where a row brings a column that it lacks and where a run ends: until then the row that a later one of
the same slide replaces is still there, and the last one counts. One process writes at a time (``fleet/rows.py`` sees to
that), and opens the file for each row, so that several may fill one table.
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
    """The rows of a ``summary.csv`` by ``slide_id``, in order, the last of each; none where there is no file.

    Raises:
        ValueError: the file is no summary.
        OSError: it cannot be read.
    """
    return {row["slide_id"]: row for row in _read_rows(path)}


def write_summary(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write ``summary.csv`` whole, with a ``score_<class>`` column for every class that occurs.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [_in_one_line(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    scores = [name for name in names if name.startswith("score_")]
    columns = [*_FIRST_COLUMNS, *scores, *_LAST_COLUMNS]
    columns += [name for name in names if name not in columns]
    if "encoder" in names and not any(row.get("prediction") for row in rows):
        columns = [name for name in columns if name not in ("prediction", "model")]  # features predict nothing
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def carried_into(row: Mapping[str, str], carried: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A slide's row with the columns of the manifest that are not ours, each under its own name.

    One that has the name of a column of the summary is carried as ``manifest_<name>``.
    """
    ours = {*_FIRST_COLUMNS, *_LAST_COLUMNS, *_OTHER_COLUMNS, *row}
    named = {
        f"manifest_{name}" if name in ours or name.startswith("score_") else name: value for name, value in carried
    }
    return {**row, **named}


def append_row(path: Path, row: Mapping[str, str]) -> None:
    """Put a slide's row into the summary, in place of the one it has.

    Raises:
        ValueError: the file is no summary.
        OSError: it cannot be read or written.
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
    """Leave one row of each slide.

    Raises:
        ValueError: the file is no summary.
        OSError: it cannot be read or written.
    """
    rows = _read_rows(path)
    latest = {row["slide_id"]: row for row in rows}
    if len(latest) < len(rows):
        write_summary(path, latest.values())


@contextlib.contextmanager
def summary_errors(path: Path) -> Iterator[None]:
    """Turn errors of the summary within the block into an :class:`OutputError` with its remedy."""
    try:
        yield
    except OutputError:
        raise
    except ValueError as error:
        raise OutputError(str(error)) from error
    except OSError as error:
        raise OutputError(
            f"the summary must be a file that can be read and written, got {as_text(path)}: "
            f"{error.strerror or error}; free space or move it away and run again, finished slides are skipped"
        ) from error


def _append(file: FileIO, row: Mapping[str, str]) -> bool:
    """Write the row after the others; False where the table must be written anew."""
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
        # Half a row, where a disk is full, would garble what comes after it.
        os.ftruncate(file.fileno(), size)
        raise
    return True


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Every row, replaced ones too; what a killed run left of a last one is dropped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        whole, end, tail = data.rpartition(b"\n")
        text = ((whole + end).decode() + tail.decode("utf-8", "replace")).removeprefix("\ufeff")
        header, *table = csv.reader(io.StringIO(text, newline=""))
    except (ValueError, csv.Error):
        header, table = [], []
    if header[:3] != list(_FIRST_COLUMNS[:3]):
        raise ValueError(
            f"a summary must be a CSV text with the columns slide_id, status, reason, ..., got {header or 'none'} in "
            f"{as_text(path)}; move that file away or choose another output folder"
        )
    if tail and table and len(table[-1]) < len(header):
        table.pop()
    blank = [""] * len(header)
    return [dict(zip(header, [*fields, *blank], strict=False)) for fields in table if fields]


def _in_one_line(row: Mapping[str, str]) -> dict[str, str]:
    """The row without what would break a line or has no encoding: a torn row is then known by its missing end."""
    return {as_text(name): as_text(value) for name, value in row.items()}

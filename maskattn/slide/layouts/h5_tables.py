"""HDF5 tables that grow batch by batch, and reading all rows at once without a second copy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.names import as_text

__all__ = ["append_rows", "attribute_float", "attribute_int", "attribute_text", "growing_table", "rows_of"]

_BYTES_PER_CHUNK = 1 << 18


def growing_table(file: Any, name: str, columns: int, dtype: np.dtype | type) -> Any:
    """Create an empty dataset (0, columns) to which rows can be appended."""
    row_bytes = max(1, columns) * np.dtype(dtype).itemsize
    chunk = (max(1, min(1024, _BYTES_PER_CHUNK // row_bytes)), columns)
    return file.create_dataset(name, (0, columns), dtype, maxshape=(None, columns), chunks=chunk)


def append_rows(table: Any, rows_BC: np.ndarray) -> None:
    """Append rows to a dataset.

    Raises:
        ValueError: the rows have another number of columns.
    """
    if rows_BC.ndim != 2 or rows_BC.shape[1] != table.shape[1]:
        raise ValueError(
            f"rows of {table.name.strip('/')} must have {table.shape[1]} columns, got shape {rows_BC.shape}; give the "
            "number of channels that the encoder has"
        )
    first = table.shape[0]
    table.resize(first + len(rows_BC), axis=0)
    table[first:] = rows_BC


def rows_of(table: Any, path: Path, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Read a dataset (T, columns) at once; a leading dimension of 1, which some versions write, is dropped.

    Args:
        table: the dataset.
        path: its file, for the message.
        dtype: the dtype of the result; None keeps the dataset's own.

    Raises:
        SlideError: the dataset has another shape.
    """
    shape = table.shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise SlideError(
            f"a table of tiles must have rows and columns, got {table.name.strip('/')}.shape={table.shape} in "
            f"{as_text(path)}; name a file with a row per tile"
        )
    rows = np.empty(shape, table.dtype if dtype is None else dtype)
    if rows.size:
        table.read_direct(rows.reshape(table.shape))
    return rows


def attribute_int(attributes: Any, name: str) -> int | None:
    """Return an attribute rounded to an integer; None if it is missing or is not a number."""
    number = attribute_float(attributes, name)
    return None if number is None else round(number)


def attribute_float(attributes: Any, name: str) -> float | None:
    """Return an attribute as a number, the first of several; None if it is missing or is not a finite number."""
    value = np.asarray(attributes.get(name, "")).ravel()[:1]
    try:
        number = float(value[0])
    except (IndexError, ValueError):
        return None
    return number if np.isfinite(number) else None


def attribute_text(attributes: Any, name: str) -> str | None:
    """Return an attribute as text; None if it is missing, empty or "None"."""
    value = attributes.get(name)
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return None if text in ("", "None") else text

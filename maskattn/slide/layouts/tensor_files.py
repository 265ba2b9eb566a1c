"""Read ``.pt`` files of one tensor without running code that they contain, and write them without a copy in memory."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from types import TracebackType

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.layouts.contents import reading
from maskattn.slide.names import as_text, shortened

__all__ = ["TensorSpool", "read_tensor"]

_ROWS_AT_ONCE = 4096


def read_tensor(path: Path) -> np.ndarray:
    """Read the tensor of a ``.pt`` file, memory-mapped if possible; bfloat16 is converted to float32.

    Raises:
        SlideError: the file cannot be read, does not contain a tensor of floats, or would run code.
    """
    import torch

    with reading(path):
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
        except pickle.UnpicklingError as error:
            raise SlideError(
                f"a .pt file of features must hold a tensor and nothing that runs code, got {as_text(path)}: "
                f"{_first_line(error)}; save the tensor alone, with torch.save(features, path)"
            ) from error
        if not isinstance(held, torch.Tensor) or held.layout != torch.strided or not held.dtype.is_floating_point:
            kind = f"a tensor of {held.dtype}" if isinstance(held, torch.Tensor) else f"a {type(held).__name__}"
            raise SlideError(
                f"a .pt file of features must hold one tensor of floats, got {kind} in {as_text(path)}; save the "
                "features alone, with torch.save(features, path)"
            )
        held = held.detach()
        return (held.float() if held.dtype == torch.bfloat16 else held).numpy()


class TensorSpool:
    """A context manager that spools rows to disk, next to the ``.pt`` file, and then writes them as one tensor.

    Args:
        path: the ``.pt`` file.
        channels: the number of columns.
        dtype: float32 or float16.
    """

    def __init__(self, path: Path, channels: int, dtype: np.dtype | type) -> None:
        self.path, self.channels, self.dtype = path, channels, np.dtype(dtype)
        self.rows = 0

    def __enter__(self) -> TensorSpool:
        # Unfinished files end in .partial, so that the cleanup after a killed run finds them.
        name = self.path.name.removesuffix(".partial")
        self._raw, self._ordered = (self.path.with_name(f"{name}-{kind}.partial") for kind in ("rows", "ordered"))
        self._file = self._raw.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        for path in (self._raw, self._ordered):
            path.unlink(missing_ok=True)

    def append(self, rows_BC: np.ndarray) -> None:
        """Append rows (B, channels).

        Raises:
            ValueError: they have another number of columns.
        """
        if rows_BC.ndim != 2 or rows_BC.shape[1] != self.channels:
            raise ValueError(
                f"rows of features must have {self.channels} columns, got shape {rows_BC.shape}; give the number of "
                "channels that the encoder has"
            )
        self._file.write(np.ascontiguousarray(rows_BC, dtype=self.dtype).data)
        self.rows += len(rows_BC)

    def save(self, order: np.ndarray | None = None, shape: tuple[int, ...] | None = None) -> None:
        """Write the ``.pt`` file.

        Args:
            order: indices that sort the rows; None keeps the order in which they were appended.
            shape: the shape of the tensor; None = (rows, channels).
        """
        import torch

        self._file.close()
        raw = self._raw if order is None else self._reordered(order)
        dtype = torch.float16 if self.dtype == np.float16 else torch.float32
        size = self.rows * self.channels
        # The tensor is memory-mapped, so that it need not fit into memory.
        tensor = torch.from_file(str(raw), False, size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        torch.save(tensor.reshape(shape or (self.rows, self.channels)), self.path)

    def _reordered(self, order: np.ndarray) -> Path:
        if not self.rows:
            return self._raw
        rows_TC = np.memmap(self._raw, self.dtype, "r", shape=(self.rows, self.channels))
        with self._ordered.open("wb") as file:
            for first in range(0, self.rows, _ROWS_AT_ONCE):
                file.write(np.ascontiguousarray(rows_TC[order[first : first + _ROWS_AT_ONCE]]).data)
        return self._ordered


def _first_line(error: Exception) -> str:
    return shortened(next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error)[:200]))

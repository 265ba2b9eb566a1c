"""HDF5 files that are written completely or not at all, even if the disk fills up in between.

HDF5 does not survive a failure of its last writes: the file can be neither closed nor released, and the process ends
with a segmentation fault when Python frees it. HDF5 therefore writes through a Python file object. The first write that
the disk refuses raises an error; what HDF5 still has to write in order to close the file goes to memory and is dropped.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskattn.files import replacing

__all__ = ["writing_h5"]


@contextlib.contextmanager
def writing_h5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for writing; it gets its name when the context ends, or is removed on any error.

    Args:
        path: the final path of the file.

    Raises:
        OSError: the file cannot be written.
    """
    import h5py

    with replacing(path) as temporary, temporary.open("w+b", buffering=0) as disk:
        lasting = _LastingFile(disk)
        file = h5py.File(lasting, "w")
        try:
            yield file
        except Exception as error:
            if lasting.error is not None:
                raise lasting.error from error
            raise
        finally:
            lasting.closing = True
            file.close()
        if lasting.error is not None:
            raise lasting.error


class _LastingFile(io.RawIOBase):
    """A file for HDF5 that keeps writes in memory if the disk refuses them while the file is being closed.

    Args:
        disk: the file on the disk.

    Attributes:
        closing: whether HDF5 is closing the file, so that failed writes must not raise an error.
        error: the first error of the disk, or None.
    """

    def __init__(self, disk: io.RawIOBase) -> None:
        super().__init__()
        self._disk = disk
        self._in_memory: list[tuple[int, bytes]] = []
        self._at = 0
        self.closing = False
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end()}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._disk.seek(self._at)
        read = 0
        while read < len(view) and (more := self._disk.readinto(view[read:])):
            read += more
        view[read:] = bytes(len(view) - read)
        for offset, data in self._in_memory:
            first, end = max(offset, self._at), min(offset + len(data), self._at + len(view))
            if first < end:
                view[first - self._at : end - self._at] = data[first - offset : end - offset]
        read = min(len(view), max(read, self._end() - self._at))
        self._at += read
        return read

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            if self._in_memory:
                raise self.error or OSError
            self._disk.seek(self._at)
            left = view
            while left:
                left = left[self._disk.write(left) or 0 :]
        except OSError as error:
            self.error = self.error or error
            if not self.closing:
                raise
            self._in_memory.append((self._at, bytes(view)))
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        try:
            self._disk.truncate(size)
        except OSError as error:
            self.error = self.error or error
            if not self.closing:
                raise
        return size

    def flush(self) -> None:
        if not self.closed:
            self._disk.flush()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _end(self) -> int:
        end = self._disk.seek(0, io.SEEK_END)
        return max([end, *(offset + len(data) for offset, data in self._in_memory)])

"""Reading a remote slide where it lies: a file object whose blocks are fetched when they are read.

A placeholder (:mod:`maskattn.slide.placeholders`) stands for the slide; whoever opens it makes a :class:`RangeFile`.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from maskattn.slide.placeholders import keep_parts, kept_parts, make_placeholder, note_of
from maskattn.slide.remote.files import RemoteFile, look_up
from maskattn.slide.remote.range_requests import RangeRequests, StoreStopped

__all__ = ["MOST_HELD_BYTES", "RangeFile", "place_remote", "present_state"]

_BLOCK_BYTES = 1 << 20
_MOST_BLOCKS = 64
MOST_HELD_BYTES = _MOST_BLOCKS * _BLOCK_BYTES
"""The most memory that the blocks of one open file take, in bytes."""

# Blocks that are read one after another are fetched by 1, 2, then 4 in one request, at several places of the file at
# once: a row of a model's tiles takes several rows of the slide's.
_MOST_AT_ONCE = 4
_MOST_OF_A_READ = 8
_MOST_PLACES = 32


def place_remote(path: Path, remote: RemoteFile) -> None:
    """Make the placeholder of a remote file.

    Args:
        path: the file to make.
        remote: the file as it was looked up, with its size.

    Raises:
        OSError: it cannot be made.
    """
    assert remote.bytes is not None
    make_placeholder(path, remote.bytes, json.dumps(asdict(replace(remote, others=()))))


def present_state(path: Path) -> tuple[int, str]:
    """Return the size and the version that the file behind a placeholder has now.

    Raises:
        StoreError: it cannot be looked up.
    """
    now = look_up(_remote_at(path).url)
    return now.bytes or 0, now.etag


class RangeFile(io.RawIOBase):
    """A remote file that is read in blocks of 1 MiB, of which it holds the last 64; threads can share it.

    After a store has failed, every read fails with the same error, and :meth:`check` raises it: decoders pass over some
    errors of the files that they read.

    Args:
        placeholder: the path of the file's placeholder.
    """

    def __init__(self, placeholder: Path) -> None:
        super().__init__()
        self.name = os.fspath(placeholder)
        remote = _remote_at(placeholder)
        assert remote.bytes is not None
        self._placeholder, self._size = placeholder, remote.bytes
        self._requests = RangeRequests(remote)
        self._held = OrderedDict((offset // _BLOCK_BYTES, data) for offset, data in kept_parts(placeholder).items())
        self._was_opened_before = bool(self._held)
        self._follows: OrderedDict[int, int] = OrderedDict()
        """For the block after each of the last fetched ones, how many were fetched together."""
        self._at = 0
        self._failure: StoreStopped | None = None
        self._lock = threading.RLock()

    def keep_held(self) -> None:
        """Keep the blocks that are held for whoever opens the placeholder next, unless there are such blocks already.

        Raises:
            OSError: the disk does not take them.
        """
        with self._lock:
            if not self._was_opened_before:
                keep_parts(self._placeholder, ((index * _BLOCK_BYTES, data) for index, data in self._held.items()))

    def check(self) -> None:
        """Raise the error with which reading failed, if it did.

        Raises:
            StoreStopped: the store did not give a part.
        """
        if self._failure is not None:
            raise self._failure

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, and return it."""
        with self._lock:
            start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
            if start + offset < 0:
                raise ValueError(f"a position must be 0 or more, got {start + offset} in '{self.name}'")
            self._at = start + offset
            return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes: as many as are asked for, or up to the end.

        Raises:
            StoreStopped: the store does not give them.
        """
        with self._lock:
            left = max(0, self._size - self._at)
            count = left if size is None or size < 0 else min(size, left)
            start, end = self._at, self._at + count
            parts = []
            while start < end:
                index, within = divmod(start, _BLOCK_BYTES)
                part = self._block(index, -(-end // _BLOCK_BYTES))[within : within + end - start]
                parts.append(part)
                start += len(part)
            self._at = end
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def readall(self) -> bytes:
        """Return the bytes up to the end."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into a buffer, and return how many there were."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._held.clear()
            self._requests.close()
        super().close()

    def _block(self, index: int, end: int) -> bytes:
        """Return a block; ``end`` is the first block that the present read does not need."""
        if index not in self._held:
            self.check()
            try:
                self._fetch(index, end)
            except StoreStopped as error:
                self._failure = error
                raise
        self._held.move_to_end(index)
        return self._held[index]

    def _fetch(self, index: int, end: int) -> None:
        at_once = min(_MOST_AT_ONCE, 2 * self._follows.pop(index, 0))
        last = min(max(index + at_once, end, index + 1), index + _MOST_OF_A_READ, -(-self._size // _BLOCK_BYTES))
        last = next((block for block in range(index + 1, last) if block in self._held), last)
        start = index * _BLOCK_BYTES
        data = self._requests.read(start, min(last * _BLOCK_BYTES, self._size))
        for block in range(index, last):
            first = (block - index) * _BLOCK_BYTES
            self._held[block] = data[first : first + _BLOCK_BYTES]
        self._follows[last] = last - index
        while len(self._follows) > _MOST_PLACES:
            self._follows.popitem(last=False)
        while len(self._held) > _MOST_BLOCKS:
            self._held.popitem(last=False)


def _remote_at(path: Path) -> RemoteFile:
    return RemoteFile(**{**json.loads(note_of(path)), "others": ()})

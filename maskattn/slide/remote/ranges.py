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
from maskattn.slide.remote.range_requests import RangeRequests, StoreStopped, changed

__all__ = ["MOST_HELD_BYTES", "HeldBlocks", "RangeFile", "place_remote", "present_state"]

_BLOCK_BYTES = 1 << 20
_MOST_BLOCKS = 64
MOST_HELD_BYTES = _MOST_BLOCKS * _BLOCK_BYTES
"""The most memory that the blocks of one open slide take, in bytes."""

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
    """Return the size and the version of the file behind a placeholder, which must still be those of its note.

    Raises:
        StoreError: it has changed, or cannot be looked up.
    """
    noted = _remote_at(path)
    now = look_up(noted.url)
    if not now.is_unchanged(noted):
        raise changed(noted)
    return now.bytes or 0, now.etag


class HeldBlocks:
    """The last 64 blocks that were read of a slide, whichever of its files they are from; threads can share them."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, index: int) -> bytes | None:
        """Return a block of a file and mark it as the last that was read; None if it is not held."""
        with self._lock:
            block = self._held.get((name, index))
            if block is not None:
                self._held.move_to_end((name, index))
            return block

    def put(self, name: str, index: int, block: bytes) -> None:
        """Hold a block, and drop others until all fit."""
        with self._lock:
            self._held[name, index] = block
            while len(self._held) > _MOST_BLOCKS:
                self._held.popitem(last=False)

    def of(self, name: str) -> dict[int, bytes]:
        """Return the blocks of a file, by their index."""
        with self._lock:
            return {index: block for (of, index), block in self._held.items() if of == name}

    def drop(self, name: str) -> None:
        """Drop the blocks of a file."""
        with self._lock:
            for key in [key for key in self._held if key[0] == name]:
                del self._held[key]


class RangeFile(io.RawIOBase):
    """A remote file that is read in blocks of 1 MiB, of which the last 64 are held; threads can share it.

    After a store has failed, every read fails with the same error, and :meth:`check` raises it: decoders pass over some
    errors of the files that they read.

    Args:
        placeholder: the path of the file's placeholder.
        held: takes the blocks, for files of the same slide; None makes one for this file.
    """

    def __init__(self, placeholder: Path, held: HeldBlocks | None = None) -> None:
        super().__init__()
        self.name = os.fspath(placeholder)
        remote = _remote_at(placeholder)
        assert remote.bytes is not None
        self._placeholder, self._size = placeholder, remote.bytes
        self._requests = RangeRequests(remote)
        self._held = held or HeldBlocks()
        kept = kept_parts(placeholder)
        self._was_opened_before = bool(kept)
        for offset, data in kept.items():
            self._held.put(self.name, offset // _BLOCK_BYTES, data)
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
                held = self._held.of(self.name)
                keep_parts(self._placeholder, ((index * _BLOCK_BYTES, data) for index, data in held.items()))

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
            self._held.drop(self.name)
            self._requests.close()
        super().close()

    def _block(self, index: int, end: int) -> bytes:
        """Return a block; ``end`` is the first block that the present read does not need."""
        block = self._held.get(self.name, index)
        if block is None:
            self.check()
            try:
                block = self._fetch(index, end)
            except StoreStopped as error:
                self._failure = error
                raise
        return block

    def _fetch(self, index: int, end: int) -> bytes:
        """Fetch a block, and those after it that this read needs or that are likely to be read next."""
        at_once = min(_MOST_AT_ONCE, 2 * self._follows.pop(index, 0))
        last = min(max(index + at_once, end, index + 1), index + _MOST_OF_A_READ, -(-self._size // _BLOCK_BYTES))
        held = self._held.of(self.name)
        last = next((block for block in range(index + 1, last) if block in held), last)
        data = self._requests.read(index * _BLOCK_BYTES, min(last * _BLOCK_BYTES, self._size))
        for block in range(index, last):
            first = (block - index) * _BLOCK_BYTES
            self._held.put(self.name, block, data[first : first + _BLOCK_BYTES])
        self._follows[last] = last - index
        while len(self._follows) > _MOST_PLACES:
            self._follows.popitem(last=False)
        return data[:_BLOCK_BYTES]


def _remote_at(path: Path) -> RemoteFile:
    return RemoteFile(**{**json.loads(note_of(path)), "others": ()})

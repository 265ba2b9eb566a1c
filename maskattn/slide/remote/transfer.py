"""Copying a remote file to a disk: broken transfers go on where they ended, and the copy is checked."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from maskattn.errors import SlideError
from maskattn.slide.names import as_text
from maskattn.slide.remote.files import PAUSE_S, TRIES, RemoteFile, look_up
from maskattn.slide.remote.stores import StoreError, open_at, store_errors
from maskattn.slide.remote.urls import shown_url

__all__ = ["TransferStopped", "copy_file", "disk_errors"]

_BLOCK_BYTES = 8 << 20


class TransferStopped(SlideError):  # noqa: N818 -- named for what happened
    """The copy is not wanted any more."""


def copy_file(remote: RemoteFile, target: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> RemoteFile:
    """Copy a file, whole or not at all.

    Args:
        remote: the file, as it was looked up.
        target: the file to write; its folder is there.
        stop: ends the copy when it is set.
        on_bytes: called with the number of bytes copied so far, also with 0 before each attempt.

    Returns:
        The version of the file that was copied: a file that is replaced meanwhile is copied anew.

    Raises:
        TransferStopped: ``stop`` was set.
        StoreError: it cannot be copied, or the copy is not what the store says.
        SlideError: the disk cannot take it.
    """
    part = target.with_name(f".{target.name}.part")
    copy = _Copy(remote, part, stop, on_bytes)
    error: StoreError | None = None
    for attempt in range(TRIES):
        if attempt and stop.wait(PAUSE_S * 2 ** (attempt - 1)):
            raise TransferStopped
        try:
            if attempt:
                copy.begin_again_if_changed()
            copy.receive()
            copy.check()
        except StoreError as failure:
            if not failure.passing:
                raise
            error = failure
        else:
            part.rename(target)
            return copy.remote
    assert error is not None
    raise StoreError(f"{error} (tried {TRIES} times)") from error


class _Copy:
    """A copy that grows until it is whole."""

    def __init__(self, remote: RemoteFile, part: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> None:
        self.remote = remote
        self._part, self._stop, self._on_bytes = part, stop, on_bytes
        self._refuted = ""
        self._begin()

    def begin_again_if_changed(self) -> None:
        """Look the file up again; what was copied of another version is dropped."""
        now = look_up(self.remote.url)
        if not now.is_unchanged(self.remote):
            self.remote = RemoteFile(**{**vars(now), "others": self.remote.others})
            self._begin()

    def receive(self) -> None:
        """Copy from where the copy ends to the end of the file."""
        self._on_bytes(self._bytes)
        if self._bytes and self._bytes == self.remote.bytes:
            return
        with store_errors(self.remote.url):
            file, start = open_at(self.remote.url, self.remote.bytes, self._bytes, _BLOCK_BYTES)
            if start != self._bytes:
                self._begin()
            with file, self._part.open("ab", buffering=0) as sink:
                while block := file.read(_BLOCK_BYTES):
                    if self._stop.is_set():
                        raise TransferStopped
                    self._append(block, sink)
        if self.remote.bytes is not None and self._bytes != self.remote.bytes:
            got, whole = self._bytes, self.remote.bytes
            if got > whole:
                self._begin()
            raise StoreError(
                f"a transfer must bring the whole file, got {got:,} of {whole:,} bytes of "
                f"{shown_url(self.remote.url)}; run it again",
                passing=True,
            )

    def check(self) -> None:
        """Compare the copy with the checksum, and the file's version with the one that was to be copied.

        Raises:
            StoreError: they differ; the next attempt begins anew.
        """
        if not look_up(self.remote.url).is_unchanged(self.remote):
            raise StoreError(
                f"a slide must stay as it is while it is copied, got {shown_url(self.remote.url)}, which was replaced; "
                "run it again",
                passing=True,
            )
        got = self._md5.hexdigest()
        # Two copies that agree are right: then the ETag is no checksum, as in stores that encrypt.
        if self.remote.md5 in ("", got) or (self.remote.md5_likely and got == self._refuted):
            return
        self._refuted = got
        self._begin()
        raise StoreError(
            f"a copy must have the checksum that its store gives, got MD5 {got} for {self.remote.md5} of "
            f"{shown_url(self.remote.url)}; run it again",
            passing=True,
        )

    def _begin(self) -> None:
        self._bytes = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        with disk_errors(self._part.parent):
            self._part.write_bytes(b"")

    def _append(self, block: bytes, sink: FileIO) -> None:
        with disk_errors(self._part.parent):
            left = memoryview(block)
            while left:
                left = left[sink.write(left) :]
        self._md5.update(block)
        self._bytes += len(block)
        self._on_bytes(self._bytes)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the cache's disk into sentences; asking the store again does not help against them."""
    try:
        yield
    except OSError as error:
        raise SlideError(
            f"the cache must be a folder that takes slides, got {as_text(folder)}: {error.strerror}; free space, "
            "or name another with --cache-dir"
        ) from error

"""Requests for parts of a remote file, each checked: its range, its length, and that it is of the expected version."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from maskattn.errors import ReadingStopped
from maskattn.slide.remote.files import TRIES, RemoteFile, from_facts, patiently
from maskattn.slide.remote.stores import StoreError, store_errors, store_of
from maskattn.slide.remote.urls import is_web, shown_url

__all__ = ["CopyNeeded", "RangeRequests", "StoreStopped", "changed"]

# Less than the time that a decoding process may take for an answer (formats/isolated_image.py), so that its slide fails
# with the store's reason.
_GIVEN_UP_AFTER_S = 90.0
# Of a version that is gone: "precondition failed", "range not satisfiable", and fsspec's own error for S3.
_CHANGED_STATUS, _CHANGED_ERROR = (412, 416), "FileExpired"
_Answer = TypeVar("_Answer")


class StoreStopped(ReadingStopped, StoreError):  # noqa: N818 -- named for what happened
    """A store does not give the parts of a slide, so that nothing more of it can be read."""


class CopyNeeded(StoreStopped):
    """A slide cannot be read in parts, because its store does not give them or its reader does not take them."""


class RangeRequests:
    """Requests for parts of one version of a file; not to be shared among threads.

    Args:
        remote: the file as it was looked up, with its size.
    """

    def __init__(self, remote: RemoteFile) -> None:
        assert remote.bytes is not None
        self._remote, self._size = remote, remote.bytes
        self._file: Any = None

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to ``end``, which lies within the file.

        Raises:
            CopyNeeded: the server sends the whole file instead.
            StoreStopped: the store does not give them, also when asked again, or has another version by now.
        """
        ask = self._ask_web if is_web(self._remote.url) else self._ask_store
        try:
            return _within(_GIVEN_UP_AFTER_S, lambda: patiently(lambda: ask(start, end)))
        except StoreStopped:
            raise
        except StoreError as error:
            raise StoreStopped(f"{error} (tried {TRIES} times)" if error.passing else str(error)) from error
        except TimeoutError as error:
            raise StoreStopped(
                f"a store must go on answering, got nothing for {_GIVEN_UP_AFTER_S:.0f} s of "
                f"{shown_url(self._remote.url)}; check the network, and run it again"
            ) from error

    def close(self) -> None:
        """Close what is open."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _ask_web(self, start: int, end: int) -> bytes:
        url = self._remote.url
        store, path = store_of(url)
        headers = dict(store.kwargs.get("headers", {})) | {"Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{end - 1}"
        with store_errors(url):
            try:
                file = store.open(path, "rb", block_size=0, size=self._size, headers=headers)
            except Exception as error:
                if _says_changed(error):
                    raise changed(self._remote) from error
                raise
            with file:
                self._check_answer(file.r, start, end)
                data = bytes(file.read(-1))
        return self._whole(data, start, end)

    def _ask_store(self, start: int, end: int) -> bytes:
        with store_errors(self._remote.url):
            try:
                if self._file is None:
                    self._file = self._opened()
                self._file.seek(start)
                data = bytes(self._file.read(end - start))
            except Exception as error:
                self._file = None  # the next attempt opens it anew
                if _says_changed(error):
                    raise changed(self._remote) from error
                raise
        return self._whole(data, start, end)

    def _opened(self) -> Any:
        """Open the file; stores that can (S3) then give parts of this version only."""
        store, path = store_of(self._remote.url)
        file = store.open(path, "rb", cache_type="none")
        facts = getattr(file, "details", None)
        if isinstance(facts, dict) and not from_facts(self._remote.url, facts).is_unchanged(self._remote):
            raise changed(self._remote)
        return file

    def _check_answer(self, answer: Any, start: int, end: int) -> None:
        """Check a web server's answer before its bytes are read."""
        shown, headers = shown_url(self._remote.url), answer.headers
        if answer.status != 206 or "Content-Range" not in headers:
            raise CopyNeeded(
                f"a server must answer a request for a part with that part, got status {answer.status} of {shown}; "
                "have the slide copied with --copy-whole"
            )
        kind = "Last-Modified" if self._remote.etag.endswith(" GMT") else "ETag"
        version = headers.get(kind, "").strip('"')
        part, _, size = headers["Content-Range"].removeprefix("bytes ").partition("/")
        if (version and version != self._remote.etag) or size not in ("*", str(self._size)):
            raise changed(self._remote)
        if part != f"{start}-{end - 1}":
            raise StoreError(
                f"a server must send the part that it was asked for, got bytes {part[:60]} for {start}-{end - 1} of "
                f"{shown}; have the slide copied with --copy-whole",
                passing=True,
            )

    def _whole(self, data: bytes, start: int, end: int) -> bytes:
        if len(data) != end - start:
            raise StoreError(
                f"a store must send the whole of a part, got {len(data):,} of {end - start:,} bytes of "
                f"{shown_url(self._remote.url)}; run it again",
                passing=True,
            )
        return data


def changed(remote: RemoteFile) -> StoreStopped:
    """Return the error of a file that is not of the version any more that was looked up."""
    return StoreStopped(
        f"a slide must stay as it is while it runs, got {shown_url(remote.url)}, which was replaced, removed or "
        "written to; nothing of this run is kept, so run it again when the file is complete"
    )


def _says_changed(error: Exception) -> bool:
    """Whether a store's error says that the version that was asked for is gone."""
    return getattr(error, "status", None) in _CHANGED_STATUS or type(error).__name__ == _CHANGED_ERROR


def _within(seconds: float, work: Callable[[], _Answer]) -> _Answer:
    """Return what ``work`` returns; it is left to itself if it takes too long.

    Raises:
        TimeoutError: it takes longer.
    """
    answers: list[_Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="range")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError
    return answers[0]

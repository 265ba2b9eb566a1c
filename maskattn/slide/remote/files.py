"""Remote files: size, ETag and checksum as their store gives them, and the files of a remote folder."""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from maskattn.slide.remote.stores import StoreError, store_errors, store_of
from maskattn.slide.remote.urls import is_url, is_web, name_of_url, path_of_url, scheme_of, shown_url

__all__ = [
    "PAUSE_S",
    "TRIES",
    "RemoteFile",
    "from_facts",
    "list_files",
    "locate",
    "look_up",
    "patiently",
    "problem_of_url",
]

TRIES, PAUSE_S = 4, 1.0
"""A store that does not answer is asked so often, after this pause and then after twice as long each time."""

_SEVERAL_FILES = (".vms", ".vmu")
_MD5 = re.compile("[0-9a-f]{32}")
_ETAGS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RemoteFile:
    """A file of an object store or a web server.

    Attributes:
        url: as it was given.
        bytes: its size; None where it was not looked up, or the store does not say.
        etag: its ETag, or another text that changes with the file; "" where the store gives none.
        md5: the checksum of its bytes, in hex digits; "" where the store gives none.
        md5_likely: whether that is an ETag of S3, which is the checksum unless the store encrypts.
        others: the other files of the slide.
    """

    url: str
    bytes: int | None = None
    etag: str = ""
    md5: str = ""
    md5_likely: bool = False
    others: tuple[RemoteFile, ...] = ()

    @property
    def total_bytes(self) -> int | None:
        """The size of all files of the slide."""
        sizes = [file.bytes for file in (self, *self.others)]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def is_unchanged(self, other: RemoteFile) -> bool:
        """Return whether both are the same version of a file, as far as the store says."""
        return (self.bytes, self.etag) == (other.bytes, other.etag)


def locate(name: str) -> tuple[Path, RemoteFile | None]:
    """Return the path of a file that a user named, and the remote file if the name is a URL."""
    return (path_of_url(name), RemoteFile(name)) if is_url(name) else (Path(name), None)


def problem_of_url(url: str) -> str | None:
    """Return why a URL cannot be run as a slide, as far as its text says, or None."""
    if "::" in url:
        return f"a URL must lead to a file directly, got {shown_url(url)}, a chain of several; name the file alone"
    if path_of_url(url).suffix.lower() in _SEVERAL_FILES:
        return (
            "a slide in an object store must be one file, MIRAX with its folder, or a DICOM series, got "
            f"{shown_url(url)}, one of several files; copy all of them to a disk, or convert the slide to TIFF"
        )
    return None


def look_up(url: str) -> RemoteFile:
    """Look up one file.

    Raises:
        StoreError: it does not exist, may not be read, or the store does not answer.
    """

    def ask() -> RemoteFile:
        store, path = store_of(url)
        with store_errors(url):
            store.invalidate_cache()
            facts = store.info(path)
        if facts.get("type") == "directory":
            raise StoreError(f"a slide must be a file, got {shown_url(url)}, a folder; end its URL with / to list it")
        return from_facts(url, facts)

    return patiently(ask)


def list_files(folder: str) -> tuple[list[RemoteFile], int]:
    """Return the files of a remote folder, sorted by name, and the number of folders in it.

    Raises:
        StoreError: as for :func:`look_up`.
    """

    def ask() -> tuple[list[RemoteFile], int]:
        store, path = store_of(folder)
        files, folders = [], 0
        with store_errors(folder):
            store.invalidate_cache()
            for facts in store.ls(path, detail=True):
                url = store.unstrip_protocol(facts["name"])
                if facts.get("type") == "directory" or url.endswith("/"):
                    folders += 1
                elif not (is_web(folder) and "?" in url):  # links that sort an index
                    files.append(from_facts(url, facts))
        return sorted(files, key=lambda file: name_of_url(file.url)), folders

    return patiently(ask)


def patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask a store, and again while it fails in a way that may pass.

    Args:
        ask: called up to four times, with pauses in between.

    Raises:
        StoreError: of the last attempt, or of one that shows that asking again does not help.
    """
    for attempt in range(TRIES - 1):
        try:
            return ask()
        except StoreError as error:
            if not error.passing:
                raise
            time.sleep(PAUSE_S * 2**attempt)
    return ask()


def from_facts(url: str, facts: dict[str, Any]) -> RemoteFile:
    """Return a file as fsspec describes it."""
    etag = next((str(facts[name]).strip('"') for name in _ETAGS if facts.get(name)), "")
    size = facts.get("size")
    md5, likely = "", False
    stated = facts.get("md5Hash") or facts.get("Content-MD5")
    if stated:
        try:
            md5 = base64.b64decode(stated, validate=True).hex()
        except (binascii.Error, ValueError, TypeError):
            md5 = ""
    elif scheme_of(url) in ("s3", "s3a") and _MD5.fullmatch(etag):
        md5, likely = etag, True
    return RemoteFile(url, None if size is None else int(size), etag, md5, likely)

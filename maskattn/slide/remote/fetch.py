"""Fetching a slide, and its mask, into the cache: in a thread, so that the slide before it can run meanwhile.

A slide whose reader can read parts of it where it lies is not copied: a placeholder stands for it, and its beginning is
read, to see that it opens.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from maskattn.errors import SlideError
from maskattn.slide.remote.cache import SlideCache
from maskattn.slide.remote.dicom_files import is_dicom
from maskattn.slide.remote.files import PAUSE_S, TRIES, RemoteFile, look_up
from maskattn.slide.remote.range_requests import CopyNeeded, StoreStopped
from maskattn.slide.remote.ranges import place_remote
from maskattn.slide.remote.slides import folder_of_others, look_up_main, look_up_slide
from maskattn.slide.remote.stores import SILENT_S, StoreError
from maskattn.slide.remote.transfer import TransferStopped, copy_file, disk_errors
from maskattn.slide.remote.urls import name_of_url, shown_url

if TYPE_CHECKING:
    from maskattn.slide.manifest import SlideJob

__all__ = ["Fetch", "urls_in_messages"]

# Smaller slides are copied.
_SMALL_BYTES = 16 << 20
# What lets a thread that waits for a store be silent: its own limit, and the pauses between attempts.
_PATIENCE_S = 2 * SILENT_S + PAUSE_S * 2**TRIES


class Fetch:
    """A slide on its way into the cache.

    Args:
        job: the slide; its URL, or its mask's, is looked up here.
        cache: where it goes.
    """

    def __init__(self, job: SlideJob, cache: SlideCache) -> None:
        self.slide_id = job.slide_id
        self._job, self._cache = job, cache
        self._stop, self._done = threading.Event(), threading.Event()
        self._heard = time.monotonic()
        self._waits = False
        self._place: Path | None = None
        self._why_copied = ""
        self._local: SlideJob | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True, name="fetch").start()

    def wait(self) -> SlideJob:
        """Return the job with paths of the copies, when they are there.

        Raises:
            StoreError: a file cannot be fetched, or the store is silent.
            SlideError: the cache cannot take it.
        """
        while not self._done.wait(0.2):
            if not self._waits and time.monotonic() - self._heard > _PATIENCE_S:
                raise StoreError(
                    f"a store must go on answering, got nothing for {_PATIENCE_S:.0f} s of the slide "
                    f"{self.slide_id!r}; check the network, and run it again"
                )
        if self._error is not None:
            raise self._error
        assert self._local is not None
        return self._local

    def is_of(self, job: SlideJob) -> bool:
        """Return whether the copies are, or may become, those of this job: the same version of the same slide."""
        if self.slide_id != job.slide_id or self._error is not None:
            return False
        if self._local is None or self._local.origin is None or job.origin is None:
            return True
        return job.origin.is_unchanged(self._local.origin)

    def end(self) -> None:
        """Remove the copies; one that is still on its way is given up."""
        self._stop.set()
        self._done.wait(1.0)
        if self._place is not None:
            self._cache.release(self._place)

    def _run(self) -> None:
        try:
            self._local = self._fetched()
        except BaseException as error:
            self._error = error
        finally:
            if self._place is not None and (self._stop.is_set() or self._error is not None):
                self._cache.release(self._place)
            self._done.set()

    def _fetched(self) -> SlideJob:
        job = self._job
        slide = None if job.origin is None else look_up_slide(job.origin.url)
        mask = None if job.mask_origin is None else look_up(job.mask_origin.url)
        sizes = [file.total_bytes for file in (slide, mask) if file is not None]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        if slide is not None and self._may_be_read_in_parts(slide) and self._stands_in(slide, mask):
            assert self._place is not None
            job = replace(job, path=self._place / name_of_url(slide.url), origin=slide)
        else:
            try:
                self._place = self._room(total)
            except SlideError as error:
                raise type(error)(f"{error}{self._why_copied}") from error
            if slide is not None:
                copied = self._copied(slide, self._place)
                job = replace(job, path=self._place / name_of_url(slide.url), origin=copied)
        if mask is not None:
            folder = self._place / "mask"
            folder.mkdir()
            self._copy(mask, folder)
            job = replace(job, mask_path=folder / name_of_url(mask.url), mask_origin=mask)
        return job

    def _may_be_read_in_parts(self, slide: RemoteFile) -> bool:
        """Whether to try: a small slide is quicker copied, and then its checksum is compared."""
        total = slide.total_bytes if not slide.others or is_dicom(slide.url) else None
        return total is not None and total > _SMALL_BYTES and not self._cache.settings.copy_whole

    def _stands_in(self, slide: RemoteFile, mask: RemoteFile | None) -> bool:
        """Make a placeholder of a slide whose reader gets parts of it; otherwise return False and leave nothing."""
        from maskattn.slide.formats.isolated_image import IsolatedDecoding  # NumPy is not needed for `--help`

        mask_bytes = 0 if mask is None else mask.bytes
        place = self._place = self._room(None if mask_bytes is None else self._cache.room_for_parts() + mask_bytes)
        there = replace(self._job, path=place / name_of_url(slide.url))
        with disk_errors(place):
            for file in (look_up_main(slide), *slide.others):
                place_remote(place / name_of_url(file.url), file)
        self._waits = True  # for the decoding process, which has a time limit of its own
        try:
            with urls_in_messages(self._job, there):
                IsolatedDecoding().open(there.path, self._cache.settings.series).close()
        except StoreStopped as error:
            self._place = None
            self._cache.release(place)
            self._why_copied = "" if isinstance(error, CopyNeeded) else f" (in parts: {error})"
            return False
        self._waits = False
        self._heard = time.monotonic()
        return True

    def _room(self, total: int | None) -> Path:
        self._waits = True
        place = self._cache.make_room(total, self._job.where, self._stop)
        self._waits = False
        self._heard = time.monotonic()
        return place

    def _copied(self, slide: RemoteFile, place: Path) -> RemoteFile:
        """Copy a slide with all of its files, and return the version that was copied."""
        copied = self._copy(look_up_main(slide), place)
        if not slide.others:
            return copied
        folder = folder_of_others(place / name_of_url(slide.url))
        folder.mkdir(exist_ok=True)
        for other in slide.others:
            self._copy(other, folder)
        if not look_up_slide(slide.url).is_unchanged(slide):
            raise StoreError(f"a slide must stay as it is while it is copied, got {shown_url(slide.url)}")
        return slide

    def _copy(self, remote: RemoteFile, folder: Path) -> RemoteFile:
        def heard(copied_bytes: int) -> None:
            self._heard = time.monotonic()
            self._cache.check_size(copied_bytes, shown_url(remote.url))

        if self._stop.is_set():
            raise TransferStopped
        return copy_file(replace(remote, others=()), folder / name_of_url(remote.url), self._stop, heard)


@contextlib.contextmanager
def urls_in_messages(job: SlideJob, here: SlideJob) -> Iterator[None]:
    """Name the URLs of a job in errors that name the files in the cache.

    Args:
        job: the job as it was named.
        here: the same with the paths in the cache.
    """
    try:
        yield
    except SlideError as error:
        told = str(error).replace(str(here.path), job.where)
        if job.mask_origin is not None:
            told = told.replace(str(here.mask_path), job.mask_where)
        if told == str(error):
            raise
        raise type(error)(told) from error

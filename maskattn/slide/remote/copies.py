"""The local copies of a run's remote slides: the present one's, and the next one's, which is fetched meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from maskattn.slide.remote.cache import CacheSettings, SlideCache
from maskattn.slide.remote.fetch import Fetch, urls_in_messages
from maskattn.slide.remote.slides import look_up_slide

if TYPE_CHECKING:
    from maskattn.slide.manifest import SlideJob

__all__ = ["Copies"]

_MOST_LOOKED_AT = 20


class Copies:
    """The copies that a process holds; a context manager. Slides on disks are not touched, and cost nothing.

    Args:
        settings: of the cache, which is opened when the first remote slide comes.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._closed_at_end = contextlib.ExitStack()
        self._cache: SlideCache | None = None
        self._ahead: Fetch | None = None

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        self._closed_at_end.close()

    def identified(self, job: SlideJob) -> SlideJob:
        """Return a job with the present size and ETag of its slide, if that is remote.

        Raises:
            StoreError: it cannot be looked up.
        """
        return job if job.origin is None else replace(job, origin=look_up_slide(job.origin.url))

    @contextlib.contextmanager
    def local(self, job: SlideJob) -> Iterator[SlideJob]:
        """Give a job whose paths are on a disk for as long as it runs; messages name the URL all the same.

        Raises:
            StoreError: it cannot be fetched.
            SlideError: the cache cannot take it.
        """
        if job.origin is None and job.mask_origin is None:
            yield job
            return
        if self._ahead is not None and not self._ahead.is_of(job):
            self._drop()
        fetch, self._ahead = self._ahead or self._fetch(job), None
        try:
            there = fetch.wait()
            # The copy's own spacing, id and columns are the job's: what was fetched ahead is the same job.
            here = replace(job, path=there.path, mask_path=there.mask_path, origin=there.origin)
            with urls_in_messages(job, here):
                yield here
        finally:
            fetch.end()

    def fetch_ahead(self, next_jobs: Sequence[SlideJob], is_finished: Callable[[SlideJob], bool]) -> None:
        """Begin to fetch the first of these that is remote and not finished.

        Args:
            next_jobs: the slides that are likely to come next, in order.
            is_finished: whether an earlier run finished a slide, which then is not read.
        """
        if self._ahead is not None:
            return
        remote = (job for job in next_jobs if job.problem is None and job.is_remote)
        for _, job in zip(range(_MOST_LOOKED_AT), remote, strict=False):
            if not is_finished(job):
                self._ahead = self._fetch(job)
                return

    @property
    def ahead(self) -> str | None:
        """The id of the slide that is being fetched ahead, or has been."""
        return None if self._ahead is None else self._ahead.slide_id

    def _fetch(self, job: SlideJob) -> Fetch:
        if self._cache is None:
            self._cache = self._closed_at_end.enter_context(SlideCache(self._settings))
        return Fetch(job, self._cache)

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead.end()
            self._ahead = None

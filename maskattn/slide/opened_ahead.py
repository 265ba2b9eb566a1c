"""The slide that a run reads next, opened while something else is loaded, and with its tissue already found.

Tissue is sought on a view of the whole slide. Decoding the view takes a tenth of a second or more of another process,
and finding tissue on that of a large slide as long, for which a run of one slide would wait once its model is loaded.
Nothing else differs: what is read and found ahead is what the run would read and find, and what fails ahead fails again
when its turn comes. Only a decoder that hangs is not waited for twice.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from maskattn.errors import ReadingStopped, SlideError
from maskattn.shapes import UInt8
from maskattn.slide.damage import DamageLog
from maskattn.slide.formats.isolated_image import start_ahead
from maskattn.slide.manifest import SlideJob
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import InkRule, TissueMask, find_tissue
from maskattn.slide.tissue.view import VIEW_UM, read_view
from maskattn.slide.unchanged import FileState

__all__ = ["open_ahead", "open_slide", "tissue_of"]

_Reader = TypeVar("_Reader", bound=SlideReader)


class _ViewedAhead(SlideReader):
    """A reader that returns a region read ahead if it is the next that is asked for, or the tissue found on it."""

    _coming: tuple[tuple[Any, ...], np.ndarray, DamageLog] | None = None
    _reads_ahead = False
    _tissue: tuple[tuple[InkRule, bool], TissueMask] | None = None

    def view_ahead(self, spacing_um: float) -> None:
        """Read the view of :func:`~maskattn.slide.tissue.view.read_view`, whose damage counts when it is asked for."""
        damages, self.damages = self.damages, DamageLog()
        self._reads_ahead = True
        try:
            read_view(self, spacing_um)
        finally:
            self._reads_ahead, self.damages = False, damages

    def tissue_ahead(self, ink: InkRule, force: bool) -> None:
        """Find the tissue on the view that was read ahead, whose damage counts when either is asked for."""
        coming, damages, self.damages = self._coming, self.damages, DamageLog()
        self.damages.merge(damages)
        try:
            with contextlib.suppress(SlideError):  # the run meets it again, and reports it
                self._tissue = (ink, force), find_tissue(self, ink=ink, force=force)
        finally:
            self._coming, self.damages = coming, damages

    def tissue(self, ink: InkRule, force: bool) -> TissueMask:
        """Return the tissue, found now unless it was found ahead and nothing has been read since."""
        found, self._tissue = self._tissue, None
        if found is None or found[0] != (ink, force) or self._coming is None:
            return find_tissue(self, ink=ink, force=force)
        self.damages.merge(self._coming[2])
        self._coming = None
        return found[1]

    def read_region(
        self, x_lv0: int, y_lv0: int, size_lv0: tuple[int, int], out_px: tuple[int, int], *, tolerant: bool = False
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Return a region as :meth:`SlideReader.read_region` does."""
        asked = (x_lv0, y_lv0, size_lv0, out_px, tolerant)
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == asked:
            self.damages.merge(coming[2])
            return coming[1]
        rgb_HW3 = super().read_region(x_lv0, y_lv0, size_lv0, out_px, tolerant=tolerant)
        if self._reads_ahead:
            self._coming = (asked, rgb_HW3, self.damages)
        return rgb_HW3

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_coming": None, "_tissue": None}


class _Opening:
    """A thread that opens a slide and finds its tissue."""

    def __init__(self, named: tuple[Any, ...], tissue: tuple[InkRule, bool] | None) -> None:
        self.named, self._tissue = named, tissue
        self._found: tuple[FileState, _ViewedAhead] | None = None
        self._stopped: ReadingStopped | None = None
        # Daemonic: an interrupted command does not wait for a drive that does not answer.
        self._thread = threading.Thread(target=self._open, name="maskattn opens a slide", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        with contextlib.suppress(Exception):  # the run meets it again, and reports it
            try:
                state, reader = _opened(_ViewedAhead, *self.named)
            except ReadingStopped as stopped:
                self._stopped = stopped
                raise
            try:
                if self._tissue is not None:
                    reader.view_ahead(VIEW_UM)
                    reader.tissue_ahead(*self._tissue)
            except ReadingStopped:
                pass  # every later read of this reader raises the same at once
            except Exception:
                reader.close()
                raise
            self._found = state, reader

    def found(self) -> tuple[FileState, _ViewedAhead] | None:
        """Wait for the thread; return the slide's state before it was opened and its reader, or None if it failed."""
        self._thread.join()
        return self._found

    def raise_if_stopped(self) -> None:
        """Raise what stopped the opening for good.

        Raises:
            ReadingStopped: the decoder hung, or crashed.
        """
        if self._stopped is not None:
            raise self._stopped


_ahead: list[_Opening] = []


def open_ahead(
    job: SlideJob, spacing_um: float | None, series: int | None, *, tissue: tuple[InkRule, bool] | None
) -> None:
    """Open a slide in a thread for the next call of :func:`open_slide`, and of :func:`tissue_of` on its reader.

    Args:
        job: a slide on this machine.
        spacing_um: µm per level-0 pixel of every slide, or None.
        series: the index of the series in a file with several, or None.
        tissue: how tissue will be sought on it, as the ``ink`` and ``force`` of ``find_tissue``; None if it will not.
    """
    start_ahead()
    if not _ahead and job.problem is None and not job.is_remote:
        _ahead.append(_Opening(_named(job, spacing_um, series), tissue))


def open_slide(job: SlideJob, spacing_um: float | None, series: int | None) -> tuple[FileState, SlideReader]:
    """Open a slide for a run, or return it if it was opened ahead; it is decoded in a process of its own.

    Args:
        job: the slide.
        spacing_um: µm per level-0 pixel of every slide, which overrides the manifest's; None takes the slide's own.
        series: the index of the series in a file with several; None takes the largest.

    Returns:
        The slide's state before it was opened, and its reader.

    Raises:
        SlideError: as :class:`SlideReader`.
        OSError: a file cannot be reached.
    """
    named = _named(job, spacing_um, series)
    while _ahead:
        opening = _ahead.pop()
        found = opening.found()
        if opening.named == named:
            opening.raise_if_stopped()
            if found is not None:
                return found
        elif found is not None:
            found[1].close()
    return _opened(SlideReader, *named)


def tissue_of(reader: SlideReader, ink: InkRule, force: bool) -> TissueMask:
    """Find the tissue of a slide that :func:`open_slide` opened, or return it if it was found ahead.

    Arguments and errors as in :func:`~maskattn.slide.tissue.find_tissue`.
    """
    return reader.tissue(ink, force) if isinstance(reader, _ViewedAhead) else find_tissue(reader, ink=ink, force=force)


def _named(job: SlideJob, spacing_um: float | None, series: int | None) -> tuple[Any, ...]:
    given = (job.spacing_um, "manifest") if spacing_um is None else (spacing_um, "override")
    return job.path, *given, series


def _opened(
    kind: type[_Reader], path: Path, spacing_um: float | None, source: str, series: int | None
) -> tuple[FileState, _Reader]:
    state = FileState.of(path)
    return state, kind(path, spacing_um, source, series=series, isolated=True)

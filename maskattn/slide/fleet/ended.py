"""Marks of ended slides: one file per slide, whose name states the slide and its status.

A mark is valid only for members with the same request; others check the slide themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maskattn.slide.fleet.folders import write_text

__all__ = ["EndedSlide", "EndedSlides", "ENDED_FOLDERS"]

ENDED_FOLDERS = "ended-"
_FAILED = "failed"


@dataclass(frozen=True)
class EndedSlide:
    """The outcome of a slide that a member ran.

    Attributes:
        slide_id: the slide's id.
        status: "ok", "skipped" or "failed".
        reason: why it was skipped or failed.
        by: the process that ran it, in words.
        token: the token of that member.
    """

    slide_id: str
    status: str
    reason: str
    by: str
    token: str


class EndedSlides:
    """The marks of one request.

    Args:
        root: the fleet's folder.
        request: a text that identifies the request.
    """

    def __init__(self, root: Path, request: str) -> None:
        self.folder = root / (ENDED_FOLDERS + hashlib.sha256(request.encode()).hexdigest()[:12])

    def names(self) -> set[str]:
        """Return the slides that have ended."""
        return {name.rpartition(".")[0] for name in self._files()}

    def find(self, slide_id: str) -> EndedSlide | None:
        """Return how a slide ended; None if it has not."""
        for status in ("ok", "skipped", _FAILED):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads((self.folder / f"{slide_id}.{status}").read_text(encoding="utf-8"))
                return EndedSlide(slide_id, status, str(found["reason"]), str(found["by"]), str(found["token"]))
        return None

    def mark(self, slide: EndedSlide) -> None:
        """Mark a slide as ended for the other members.

        Raises:
            OSError: the folder cannot be written.
        """
        record = json.dumps({"reason": slide.reason, "by": slide.by, "token": slide.token})
        write_text(self.folder / f"{slide.slide_id}.{slide.status}", record)

    def forget_failed(self, is_kept: Callable[[str], bool]) -> None:
        """Remove the marks of failed slides, so that they are retried.

        Args:
            is_kept: whether the marks of a member are kept, by its token.
        """
        for name in self._files():
            slide_id, _, status = name.rpartition(".")
            slide = self.find(slide_id) if status == _FAILED else None
            if slide is not None and slide.status == _FAILED and not is_kept(slide.token):
                (self.folder / name).unlink(missing_ok=True)

    def _files(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.folder) if not name.startswith(".")]
        except FileNotFoundError:
            return []

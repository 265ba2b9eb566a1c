"""The job of one slide, as every source of slides produces it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskattn.slide.remote.files import RemoteFile
from maskattn.slide.remote.urls import shown_url

__all__ = ["SlideJob"]


@dataclass(frozen=True)
class SlideJob:
    """One slide to predict.

    Attributes:
        slide_id: the slide's id, which names its output folder and its row of the summary.
        path: the slide file; of a remote slide only its name, until it is copied.
        mask_path: the user's own tissue mask; None to find the tissue.
        spacing_um: µm per level-0 pixel according to the manifest; None to read it from the file.
        problem: why this job cannot run, found while the jobs were collected; None if it can.
        carried: names and values of the manifest's other columns, for the summary.
        origin: the slide's file in an object store or on a web server; None if it is on a disk.
        mask_origin: the same of the mask.
    """

    slide_id: str
    path: Path
    mask_path: Path | None = None
    spacing_um: float | None = None
    problem: str | None = None
    carried: tuple[tuple[str, str], ...] = ()
    origin: RemoteFile | None = None
    mask_origin: RemoteFile | None = None

    @property
    def is_remote(self) -> bool:
        """Whether the slide or its mask is in an object store or on a web server."""
        return self.origin is not None or self.mask_origin is not None

    @property
    def location(self) -> Path | str:
        """The slide's path, or its URL without what may be a credential."""
        return self.path if self.origin is None else shown_url(self.origin.url)

    @property
    def where(self) -> str:
        """The same as a text, as it is shown and recorded."""
        return str(self.location)

    @property
    def mask_where(self) -> str:
        """The mask's path or URL."""
        return str(self.mask_path) if self.mask_origin is None else shown_url(self.mask_origin.url)

    @property
    def bytes(self) -> int | None:
        """The size of the slide's file; None if that is remote and was not looked up."""
        return self.path.stat().st_size if self.origin is None else self.origin.bytes

    @property
    def etag(self) -> str:
        """The version of a remote slide; "" of one on a disk."""
        return "" if self.origin is None else self.origin.etag

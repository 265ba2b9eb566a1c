"""The contract of a layout: whose folders, names, dtypes and attributes a file of tile features has.

A layout recognises files by what they hold, reads them, says where under a folder they lie, and, where ours are
written in it, writes them as a stream: batches of tiles come in any number, memory is that of a batch, and the files
have their names when all have come, those that other tools look for last.

Dimension key: T tiles of the slide, B tiles of a batch, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from maskattn.slide.layouts.contents import FileContents
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures, TileHeader
from maskattn.slide.names import problem_of_id

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["FeatureLayout", "FeatureReader", "TakeTiles", "folder_name", "known_fields", "writable_id"]

TakeTiles = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], None]
"""Takes features (B, C), coordinates (B, 2) in level-0 pixels and the tiles' fractions of tissue (B,) or None."""


class FeatureReader(Protocol):
    """A layout that is read."""

    @property
    def name(self) -> str:
        """The name that users give."""

    @property
    def feature_patterns(self) -> tuple[str, ...]:
        """Where feature files lie below a folder that users name, ``{id}`` for the slide's id, the first ones first."""

    @property
    def coords_patterns(self) -> tuple[str, ...]:
        """Where files of coordinates lie; feature files, which have theirs, are not among them."""

    def has_features(self, contents: FileContents) -> bool:
        """Whether this is a feature file of the layout."""

    def has_coords(self, contents: FileContents) -> bool:
        """Whether this is a file of coordinates of the layout, without features."""

    def read_features(self, path: Path, slide: SlideInfo | None, encoder: str | None) -> TileFeatures:
        """Read a feature file.

        Args:
            path: of the file.
            slide: the slide, for what the file leaves open.
            encoder: whose features, where the file holds those of several.

        Raises:
            SlideError: the file cannot be used.
        """

    def read_coords(self, path: Path, slide: SlideInfo | None) -> TileCoords:
        """Read a file of coordinates, or those of a feature file.

        Raises:
            SlideError: the file cannot be used.
        """


class FeatureLayout(FeatureReader, Protocol):
    """A layout that is read and written."""

    def path_of(self, root: Path, header: TileHeader) -> Path:
        """Where a slide's features are written: the file that is there when all is."""

    def writing(
        self, root: str | Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32
    ) -> AbstractContextManager[TakeTiles]:
        """Write a slide's features; the context gives the function that takes a batch of tiles.

        Args:
            root: the folder below which the layout's folders are made.
            header: what holds for all tiles.
            channels: C.
            dtype: of the features, float32 or float16, where the layout leaves it open.

        Raises:
            ValueError: the header lacks what the layout must have.
            OSError: a file cannot be written.
        """


def folder_name(encoder: str | None) -> str:
    """An encoder's name as part of a folder's: signs that file systems have a use for become ``_``."""
    return re.sub(r"[^\w.+-]", "_", encoder or "unknown")


def writable_id(header: TileHeader) -> str:
    """The slide's id, which the files are named after.

    Raises:
        ValueError: it cannot name a file.
    """
    problem = problem_of_id(header.slide_id) or ("" if header.slide_id else "a slide_id must not be empty, got ''")
    if problem:
        raise ValueError(problem)
    return header.slide_id


def known_fields(layout: str, header: TileHeader, *fields: str) -> tuple[float, ...]:
    """Fields of the header that a layout cannot do without.

    Raises:
        ValueError: one is None.
    """
    missing = [field for field in fields if getattr(header, field) is None]
    if missing:
        raise ValueError(
            f"the layout {layout} must have {', '.join(fields)} of the tiles, got none of {', '.join(missing)} for "
            f"{header.slide_id!r}; give the header them or choose another --layout"
        )
    return tuple(getattr(header, field) for field in fields)

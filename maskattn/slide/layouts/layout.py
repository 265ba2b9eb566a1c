"""The contract of a layout: the folders, names, dtypes and attributes of a tool's files of tile features.

A layout recognises files by their contents, finds them below a folder, and reads them. One that is also written takes
a stream of batches of tiles, in the memory of one batch; the files appear after the last batch, and those that other
tools look for appear last.

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
    """A layout that can be read."""

    @property
    def name(self) -> str:
        """The name by which users choose the layout."""

    @property
    def feature_patterns(self) -> tuple[str, ...]:
        """Glob patterns of feature files below a folder, with ``{id}`` for the slide's id, in order of preference."""

    @property
    def coords_patterns(self) -> tuple[str, ...]:
        """Glob patterns of files of coordinates; feature files, which have coordinates too, are not included."""

    def has_features(self, contents: FileContents) -> bool:
        """Return whether this is a feature file of the layout."""

    def has_coords(self, contents: FileContents) -> bool:
        """Return whether this is a file of coordinates of the layout, without features."""

    def read_features(self, path: Path, slide: SlideInfo | None, encoder: str | None) -> TileFeatures:
        """Read a feature file.

        Args:
            path: the file.
            slide: the slide, to complete metadata that the file lacks.
            encoder: the name of the encoder, if the file has features of several.

        Raises:
            SlideError: the file cannot be used.
        """

    def read_coords(self, path: Path, slide: SlideInfo | None) -> TileCoords:
        """Read a file of coordinates, or the coordinates of a feature file.

        Raises:
            SlideError: the file cannot be used.
        """


class FeatureLayout(FeatureReader, Protocol):
    """A layout that can be read and written."""

    def path_of(self, root: Path, header: TileHeader) -> Path:
        """Return the path of a slide's feature file, the last file to appear."""

    def writing(
        self, root: str | Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32
    ) -> AbstractContextManager[TakeTiles]:
        """Write a slide's features; the context yields a function that takes a batch of tiles.

        Args:
            root: the folder below which the layout's folders are made.
            header: the metadata of all tiles.
            channels: C.
            dtype: dtype of the features, float32 or float16; ignored by layouts that prescribe one.

        Raises:
            ValueError: the header lacks a field that the layout requires.
            OSError: a file cannot be written.
        """


def folder_name(encoder: str | None) -> str:
    """Return an encoder's name for use in a folder's name: characters special to file systems become ``_``."""
    return re.sub(r"[^\w.+-]", "_", encoder or "unknown")


def writable_id(header: TileHeader) -> str:
    """Return the slide's id after checking that it can name a file.

    Raises:
        ValueError: it cannot.
    """
    problem = problem_of_id(header.slide_id) or ("" if header.slide_id else "a slide_id must not be empty, got ''")
    if problem:
        raise ValueError(problem)
    return header.slide_id


def known_fields(layout: str, header: TileHeader, *fields: str) -> tuple[float, ...]:
    """Return fields of the header that a layout requires.

    Raises:
        ValueError: a field is None.
    """
    missing = [field for field in fields if getattr(header, field) is None]
    if missing:
        raise ValueError(
            f"the layout {layout} must have {', '.join(fields)} of the tiles, got none of {', '.join(missing)} for "
            f"{header.slide_id!r}; give the header them or choose another --layout"
        )
    return tuple(getattr(header, field) for field in fields)

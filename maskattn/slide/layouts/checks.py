"""Check tile features and coordinates: equal numbers of both, finite features, positions within the slide."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures
from maskattn.slide.names import as_text, shortened

__all__ = ["check_inside", "check_same_slide", "checked_features", "features_of", "whole_coords"]

_ROWS_AT_ONCE = 4096


def whole_coords(coords: np.ndarray, path: Path) -> np.ndarray:
    """Return coordinates (T, 2) as int64.

    Raises:
        SlideError: they have another shape, or are not integers.
    """
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise SlideError(
            f"coords must hold x and y of each tile, got coords.shape={coords.shape} in {as_text(path)}; name a file "
            "of coordinates of a slide's tiles"
        )
    whole = np.isfinite(coords) & (coords == np.round(coords))
    if not whole.all():
        raise SlideError(
            f"coords must be whole level-0 pixels, got {coords[~whole].ravel()[0]} in {as_text(path)}; write the "
            "coordinates again"
        )
    return coords.astype(np.int64, copy=False)


def checked_features(features_TC: np.ndarray, tiles: int, path: Path) -> np.ndarray:
    """Return features (T, C) as float32 or float16, after checking that there is a finite row for each tile.

    Raises:
        SlideError: their number differs from that of the coordinates, or some are NaN or infinite.
    """
    if features_TC.ndim != 2 or len(features_TC) != tiles:
        raise SlideError(
            f"a feature file must have a row of features for each tile, got features.shape={features_TC.shape} for "
            f"{tiles:,} coordinates (coords.shape=({tiles}, 2)) in {as_text(path)}; extract the slide again"
        )
    if features_TC.dtype not in (np.float32, np.float16):
        features_TC = features_TC.astype(np.float32)
    finite_T = np.ones(tiles, bool)
    for first in range(0, tiles, _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        finite_T[rows] = np.isfinite(features_TC[rows]).all(axis=1)
    if not finite_T.all():
        broken = np.flatnonzero(~finite_T)
        raise SlideError(
            f"features must be finite, got NaN or infinite ones for {len(broken):,} of {tiles:,} tiles (the first is "
            f"tile {broken[0]}) in {as_text(path)}; extract the slide again, in float32 where half precision overflowed"
        )
    return features_TC


def check_inside(tiles: TileCoords) -> None:
    """Check that every tile overlaps its slide, if the slide's size is known.

    Raises:
        SlideError: some tiles are outside.
    """
    if tiles.width_px is None or tiles.height_px is None or not tiles.on_level0 or not len(tiles.coords_T2):
        return
    side = tiles.patch_size_lv0 or 1
    size = np.array([tiles.width_px, tiles.height_px])
    outside_T = np.any((tiles.coords_T2 + side <= 0) | (tiles.coords_T2 >= size), axis=1)
    if outside_T.any():
        x, y = tiles.coords_T2[outside_T][0]
        raise SlideError(
            f"coordinates must lie in the slide of {tiles.width_px} × {tiles.height_px} level-0 pixels, got "
            f"{np.count_nonzero(outside_T):,} of {len(outside_T):,} tiles outside, the first at x={x}, y={y}, in "
            f"{as_text(tiles.source)}; name the file of this slide, with coordinates in level-0 pixels"
        )


def check_same_slide(tiles: TileCoords, named: tuple[str, ...], size: tuple[int, int] | None) -> None:
    """Check that a file belongs to the requested slide, by the id and the size that the file states.

    Args:
        tiles: the coordinates or features that were read.
        named: the accepted names of the slide; an empty tuple accepts any.
        size: (width, height) of the slide's level 0; None if it is not known.

    Raises:
        SlideError: the file is of another slide.
    """
    if named and tiles.slide_id not in named:
        raise SlideError(
            f"a file of features or coordinates must be of the slide {shortened(named[0])!r}, got one of "
            f"{shortened(tiles.slide_id)!r} in {as_text(tiles.source)}; name the file of this slide"
        )
    if size is not None and None not in (tiles.width_px, tiles.height_px) and size != (tiles.width_px, tiles.height_px):
        raise SlideError(
            f"a file of features or coordinates must be of this slide of {size[0]} × {size[1]} level-0 pixels, got one "
            f"of a slide of {tiles.width_px} × {tiles.height_px} in {as_text(tiles.source)}; name the file of this "
            "slide"
        )


def features_of(places: TileCoords, features_TC: np.ndarray, **header: object) -> TileFeatures:
    """Combine coordinates and features, with further fields of the header.

    Raises:
        SlideError: there is not one finite row of features for each tile.
    """
    features_TC = checked_features(features_TC, len(places.coords_T2), places.source)
    return TileFeatures(**{**vars(places), **header, "features_TC": features_TC})

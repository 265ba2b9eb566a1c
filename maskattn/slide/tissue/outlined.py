"""Tissue given or limited by outlines: a mask of polygons, a region of interest, and excluded areas.

The tissue shares of tokens are computed from the outlines, not from a raster of them, so that an outline along the
lattice of tokens, as in ``relevance.geojson``, gives back exactly those tokens.
The raster, ``mask_HW``, is for display.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Bool, Float
from maskattn.slide.names import as_text
from maskattn.slide.outlines.coverage import edges_of, share_covered
from maskattn.slide.outlines.reading import read_outlines
from maskattn.slide.reader import SlideInfo
from maskattn.slide.tissue.mask import TissueMask, mask_of_slide

__all__ = ["limit_tissue", "load_outlines"]

_VIEW_UM = 8.0
_MOST_VIEW_PX = 4096
_BAND_PX = 256  # rows of the raster that are computed at once
# QuPath writes two decimals, so an edge may be off its line by the rounding.
_ROUNDED_LV0 = 0.01


@dataclass(frozen=True, eq=False)
class _Area:
    """An area, given by the edges of its outline."""

    edges_E4: Float[np.ndarray, "E 4"]

    def shares(
        self, x_lv0: float, y_lv0: float, side_lv0: tuple[float, float], shape: tuple[int, int]
    ) -> Float[np.ndarray, "R C"]:
        """Return the share of each square that is covered, with slivers that come from rounding set to 0 or 1."""
        share_RC = share_covered(self.edges_E4, x_lv0, y_lv0, side_lv0, shape)
        sliver = 2 * _ROUNDED_LV0 / min(side_lv0)
        share_RC[share_RC <= sliver] = 0.0
        share_RC[share_RC >= 1 - sliver] = 1.0
        return share_RC

    def picture(self, info: SlideInfo, shape: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
        """Return a raster of the slide, True where at least half of a pixel is covered."""
        side = info.width_px / shape[1], info.height_px / shape[0]
        shown = np.zeros(shape, bool)
        for top in range(0, shape[0], _BAND_PX):
            rows = min(_BAND_PX, shape[0] - top)
            shown[top : top + rows] = self.shares(0.0, top * side[1], side, (rows, shape[1])) >= 0.5
        return shown


@dataclass(frozen=True, eq=False)
class _OutlinedTissue(TissueMask):
    """Tissue that is given by outlines."""

    area: _Area = field(kw_only=True)

    def token_fractions(
        self, x_lv0: float, y_lv0: float, token_lv0: float, shape: tuple[int, int]
    ) -> Float[np.ndarray, "R C"]:
        """Return the share of each token that is tissue, computed from the outlines."""
        return self.area.shares(x_lv0, y_lv0, (token_lv0, token_lv0), shape)


@dataclass(frozen=True, eq=False)
class _LimitedTissue(TissueMask):
    """Tissue limited to tokens with at least half of their area in one area, and less than half in another."""

    whole: TissueMask = field(kw_only=True)
    within: _Area | None = field(kw_only=True)
    without: _Area | None = field(kw_only=True)

    def token_fractions(
        self, x_lv0: float, y_lv0: float, token_lv0: float, shape: tuple[int, int]
    ) -> Float[np.ndarray, "R C"]:
        """Return the share of each token that is tissue, and 0 for tokens outside of the limits."""
        fraction = self.whole.token_fractions(x_lv0, y_lv0, token_lv0, shape).copy()
        side = token_lv0, token_lv0
        if self.within is not None:
            fraction[self.within.shares(x_lv0, y_lv0, side, shape) < 0.5] = 0.0
        if self.without is not None:
            fraction[self.without.shares(x_lv0, y_lv0, side, shape) >= 0.5] = 0.0
        return fraction


def load_outlines(path: str | os.PathLike[str], info: SlideInfo, classes: Sequence[str] | None = None) -> TissueMask:
    """Read the tissue that a GeoJSON file outlines.

    Args:
        path: the file, in level-0 pixels.
        info: the slide that the file belongs to.
        classes: names of the classifications that are tissue; None takes all but QuPath's "Ignore*".

    Raises:
        SlideError: see :func:`maskattn.slide.outlines.reading.read_outlines`.
    """
    outlines = read_outlines(path, info, classes)
    area = _Area(edges_of(outlines.area))
    longest_um = max(info.width_px, info.height_px) * info.spacing_um
    step_um = max(_VIEW_UM, longest_um / _MOST_VIEW_PX)
    shape = tuple(max(1, round(length * info.spacing_um / step_um)) for length in (info.height_px, info.width_px))
    mask = mask_of_slide(area.picture(info, (shape[0], shape[1])), info, "outlines", outlines.notes)
    share = float(outlines.area.area / (info.width_px * info.height_px))
    return _OutlinedTissue(**{**_fields(mask), "tissue_fraction": share}, area=area)


def limit_tissue(
    tissue: TissueMask,
    info: SlideInfo,
    slide_id: str,
    roi: tuple[Path | None, Sequence[str] | None] = (None, None),
    exclude: tuple[Path | None, Sequence[str] | None] = (None, None),
) -> TissueMask:
    """Limit tissue to a region of interest, and remove excluded areas from it.

    A token is kept if at least half of it is in the region, and less than half in excluded areas.

    Args:
        tissue: the tissue of the slide.
        info: the slide.
        slide_id: the slide's id; in a folder of files the slide's own is ``<slide_id>.geojson``.
        roi: the region: a GeoJSON file or a folder of them, and the classes to read; None for no limit.
        exclude: the excluded areas, given like ``roi``; a folder may lack a slide's file.

    Raises:
        SlideError: a file cannot be read as outlines on this slide, or the folder of regions lacks this slide's file.
    """
    within_path, without_path = _of_slide(roi[0], slide_id, needed=True), _of_slide(exclude[0], slide_id, needed=False)
    if within_path is None and without_path is None:
        return tissue
    mask_HW, notes = tissue.mask_HW.copy(), list(tissue.notes)
    shape = mask_HW.shape[0], mask_HW.shape[1]
    within = without = None
    method = tissue.method
    if within_path is not None:
        within, read_notes = _read_area(within_path, info, roi[1])
        mask_HW &= within.picture(info, shape)
        notes += [f"region of interest: {note}" for note in read_notes]
        method += f" within {as_text(within_path.name)}"
    if without_path is not None:
        without, read_notes = _read_area(without_path, info, exclude[1])
        mask_HW &= ~without.picture(info, shape)
        notes += [f"exclusion: {note}" for note in read_notes]
        method += f" without {as_text(without_path.name)}"
    limited = mask_of_slide(mask_HW, info, method, notes)
    return _LimitedTissue(**_fields(limited), whole=tissue, within=within, without=without)


def _read_area(path: Path, info: SlideInfo, classes: Sequence[str] | None) -> tuple[_Area, tuple[str, ...]]:
    outlines = read_outlines(path, info, classes)
    return _Area(edges_of(outlines.area)), outlines.notes


def _of_slide(path: Path | None, slide_id: str, needed: bool) -> Path | None:
    """Return the slide's own file if ``path`` is a folder of files, else ``path``."""
    if path is None or not path.is_dir():
        return path
    own = path / f"{slide_id}.geojson"
    if own.exists():
        return own
    if needed:
        raise SlideError(
            f"a folder of regions of interest must have a file for each slide, got no {as_text(own.name)} in "
            f"{as_text(path)}; draw the region, or run the slide without --roi"
        )
    return None


def _fields(mask: TissueMask) -> dict[str, Any]:
    return {one.name: getattr(mask, one.name) for one in fields(TissueMask)}

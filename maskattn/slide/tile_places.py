"""The positions of tiles that are encoded one by one, on a lattice that may overlap itself, or as they were given.

A tile of ``patch_px`` at ``spacing_um`` covers ``tile_lv0 = round(patch_px · spacing_um / slide spacing)`` level-0
pixels, and is read as an image of ``tile_px``; the step between neighbours is ``tile_lv0`` minus the overlap. Whether a
tile is kept depends on the fraction of its area that is tissue. The area is exact: the sum of a mask over all pixels
above and left of a point is bilinear between the mask's pixels.

Dimension key: T tiles; h, w tokens of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Bool, Float, Int
from maskattn.slide.reader import SlideInfo
from maskattn.slide.tissue import TissueMask

__all__ = ["TilePlaces", "lay_tiles", "tissue_share", "with_tokens"]

_MAX_CELLS = 20_000_000
# The number of token corners whose sums are looked up at once, to bound memory.
_BAND_CORNERS = 1 << 20


@dataclass(frozen=True, eq=False)
class TilePlaces:
    """The tiles of a slide that are encoded.

    Attributes:
        coords_lv0: (T, 2) int64, x and y of each tile's top left corner.
        tile_lv0: side of a tile in level-0 pixels.
        tile_px: side of the image that a tile is read as.
        cells: the number of tiles of the lattice, kept or not; T if the positions were given.
        tissue_T: (T,) the tissue fraction of each tile, 0 to 1; None if tissue was not segmented.
        token_keep_THW: (T, h, w) bool, True for kept tokens; None if all tokens take part.
    """

    coords_lv0: Int[np.ndarray, "T 2"]
    tile_lv0: int
    tile_px: int
    cells: int
    tissue_T: Float[np.ndarray, " T"] | None = None
    token_keep_THW: Bool[np.ndarray, "T h w"] | None = None

    @property
    def kept_tiles(self) -> int:
        """T, the number of tiles."""
        return len(self.coords_lv0)


def lay_tiles(
    info: SlideInfo,
    tissue: TissueMask,
    *,
    patch_px: int,
    overlap_px: int,
    spacing_um: float,
    tile_px: int,
    min_tissue: float,
    before_lv0: tuple[int, int] = (0, 0),
) -> TilePlaces:
    """Lay tiles over a slide from its level-0 corner, row by row, and keep those with enough tissue.

    The area of a tile beyond the slide's edge counts as glass.

    Args:
        info: the slide's size and spacing.
        tissue: the tissue mask.
        patch_px: side of a tile in pixels at ``spacing_um``.
        overlap_px: overlap of neighbouring tiles in those pixels.
        spacing_um: µm per pixel of a tile.
        tile_px: side of the image that a tile is read as.
        min_tissue: smallest tissue fraction of a kept tile, 0 to 1; 0 keeps any tissue.
        before_lv0: (x, y), the distance in level-0 pixels by which the tiles start before that corner.

    Raises:
        SlideError: a tile would cover less than a level-0 pixel, or there would be more than 20 million.
    """
    tile_lv0 = round(patch_px * spacing_um / info.spacing_um)
    if tile_lv0 < 1:
        raise SlideError(
            f"a tile must cover at least one level-0 pixel, got {patch_px} px at {spacing_um:g} µm on a slide of "
            f"{info.spacing_um:g} µm per pixel; check the slide's spacing (`--slide-spacing-um`)"
        )
    step = max(1, tile_lv0 - round(overlap_px * tile_lv0 / patch_px))
    cols, rows = (
        1 + math.ceil(max(0, side + before - tile_lv0) / step)
        for side, before in zip((info.width_px, info.height_px), before_lv0, strict=True)
    )
    if rows * cols > _MAX_CELLS:
        raise SlideError(
            f"a slide may have up to {_MAX_CELLS:,} tiles, got {rows:,} × {cols:,} for {info.width_px} × "
            f"{info.height_px} px at {info.spacing_um:g} µm per pixel; check its spacing (`--slide-spacing-um`)"
        )
    coords_C2 = np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), axis=-1).reshape(-1, 2).astype(np.int64) * step
    coords_C2 -= before_lv0
    share_C = tissue_share(tissue, coords_C2, tile_lv0)[:, 0, 0]
    kept_C = (share_C > 0) & (share_C >= min_tissue)
    return TilePlaces(coords_C2[kept_C], tile_lv0, tile_px, rows * cols, share_C[kept_C])


def with_tokens(places: TilePlaces, tissue: TissueMask, token_px: int) -> TilePlaces:
    """Return the tiles with their tissue fractions, and with only those tokens kept that contain tissue.

    Args:
        places: the tiles.
        tissue: the tissue mask.
        token_px: side of a token in pixels of the image that a tile is read as.
    """
    side = places.tile_px // token_px
    share_Thw = tissue_share(tissue, places.coords_lv0, places.tile_lv0, side)
    tissue_T = share_Thw.mean(axis=(1, 2), dtype=np.float32)
    return TilePlaces(places.coords_lv0, places.tile_lv0, places.tile_px, places.cells, tissue_T, share_Thw > 0)


def tissue_share(
    tissue: TissueMask, coords_T2: Int[np.ndarray, "T 2"], tile_lv0: int, side: int = 1
) -> Float[np.ndarray, "T h w"]:
    """Return the tissue fraction (T, side, side) of the squares that divide each tile, 0 to 1 and 0 beyond the slide.

    Args:
        tissue: the tissue mask.
        coords_T2: (T, 2) level-0 x, y of each tile's top left corner.
        tile_lv0: side of a tile in level-0 pixels.
        side: the number of squares along a tile.
    """
    sums = np.zeros(np.add(tissue.mask_HW.shape, 1))
    np.cumsum(np.cumsum(tissue.mask_HW, axis=0, dtype=np.float64), axis=1, out=sums[1:, 1:])
    edges = np.arange(side + 1) * (tile_lv0 / side)
    area_px = (tile_lv0 / side) ** 2 / (tissue.px_lv0[0] * tissue.px_lv0[1])
    shares = np.empty((len(coords_T2), side, side), np.float32)
    band = max(1, _BAND_CORNERS // (side + 1) ** 2)
    for first in range(0, len(coords_T2), band):
        xy_T2 = coords_T2[first : first + band]
        x_Tw, y_Th = ((xy_T2[:, axis, None] + edges) / tissue.px_lv0[axis] for axis in (0, 1))
        above = _sums_at(sums, y_Th[:, :, None], x_Tw[:, None, :])
        inside = above[:, 1:, 1:] - above[:, :-1, 1:] - above[:, 1:, :-1] + above[:, :-1, :-1]
        # The rounding error of an empty square is not tissue.
        shares[first : first + band] = np.where(inside > 1e-6, inside / area_px, 0)
    return shares.clip(0, 1)


def _sums_at(sums: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the sums of the mask above and left of points, by bilinear interpolation, which is exact."""
    rows, cols = sums.shape[0] - 1, sums.shape[1] - 1
    y, x = y.clip(0, rows), x.clip(0, cols)
    top, left = np.minimum(y.astype(np.int64), rows - 1), np.minimum(x.astype(np.int64), cols - 1)
    down, right = y - top, x - left
    upper = sums[top, left] * (1 - right) + sums[top, left + 1] * right
    lower = sums[top + 1, left] * (1 - right) + sums[top + 1, left + 1] * right
    value: np.ndarray = upper * (1 - down) + lower * down
    return value

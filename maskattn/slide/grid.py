"""The grid of a slide: tiles on a lattice from the level-0 corner, their tokens, and which of both are kept.

A tile of ``tile_px`` at ``spacing_um`` covers ``tile_lv0 = round(tile_px · spacing_um / slide spacing)`` level-0
pixels; a token covers ``tile_lv0 · token_px / tile_px`` of them, which need not be an integer. Whether a token is kept
depends on the area of tissue in it.

Dimension key: H, W cells of the grid; T kept tiles, row-major; h, w tokens of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Bool, Int
from maskattn.slide.reader import SlideInfo
from maskattn.slide.tissue import TissueMask

__all__ = ["TokenGrid", "make_grid"]

_MAX_CELLS = 20_000_000
# The lattice is processed in bands of tile rows, of so many tokens at once, to bound memory.
_BAND_TOKENS = 4 << 20


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """The tiles of a slide that are kept, and their kept tokens.

    Attributes:
        keep_HW: (H, W) bool over the cells of the grid, True = the tile has a kept token.
        coords_lv0: (T, 2) int64, x and y of the top left corner of each kept tile, row-major (y, then x).
        token_keep_THW: (T, h, w) bool, the kept tokens of each kept tile.
        tile_px: side of a tile in pixels, as the model sees it.
        token_px: side of a token in those pixels.
        spacing_um: µm per pixel, as the model sees it.
        tile_lv0: side of a tile in level-0 pixels.
        width_px: width of the slide's level 0.
        height_px: height of the slide's level 0.
    """

    keep_HW: Bool[np.ndarray, "H W"]
    coords_lv0: Int[np.ndarray, "T 2"]
    token_keep_THW: Bool[np.ndarray, "T h w"]
    tile_px: int
    token_px: int
    spacing_um: float
    tile_lv0: int
    width_px: int
    height_px: int

    @property
    def token_lv0(self) -> float:
        """Side of a token in level-0 pixels."""
        return self.tile_lv0 * self.token_px / self.tile_px

    @property
    def cells(self) -> int:
        """The number of tiles of the grid, kept or not."""
        return self.keep_HW.size

    @property
    def kept_tiles(self) -> int:
        """T, the number of tiles that have a kept token."""
        return self.coords_lv0.shape[0]

    @property
    def tokens(self) -> int:
        """The number of tokens inside the slide, kept or not."""
        return _tokens_within(self.width_px, self.token_lv0) * _tokens_within(self.height_px, self.token_lv0)

    @property
    def kept_tokens(self) -> int:
        """The number of kept tokens."""
        return int(np.count_nonzero(self.token_keep_THW))

    @property
    def skipped_tokens(self) -> int:
        """The number of tokens inside the slide that are not kept."""
        return self.tokens - self.kept_tokens


def make_grid(
    info: SlideInfo,
    tissue: TissueMask | None,
    *,
    tile_px: int,
    token_px: int,
    spacing_um: float,
    min_token_fraction: float = 0.0,
    masked: bool = True,
    before: tuple[int, int] = (0, 0),
) -> TokenGrid:
    """Lay the grid over a slide and determine which tokens are kept.

    A token is inside the slide if its centre is; the first of each axis always is, so that a slide smaller than a token
    still has one. A token is kept if tissue covers some of its area and at least ``min_token_fraction`` of it; any area
    beyond the slide's edge counts as glass. A tile is kept if any of its tokens is.

    Args:
        info: the slide's size and spacing.
        tissue: the tissue mask; may be None if ``masked`` is False.
        tile_px: side of a tile in pixels at ``spacing_um``.
        token_px: side of a token in pixels; must divide ``tile_px``.
        spacing_um: µm per pixel of the model's input.
        min_token_fraction: smallest tissue fraction of a kept token, 0 to 1.
        masked: False keeps every token inside the slide.
        before: (x, y), the number of tokens, fewer than along a tile, by which the grid starts before the slide's
            corner.

    Raises:
        ValueError: an argument is out of range, or the mask belongs to another slide.
        SlideError: the grid would have more than 20 million tiles, or tiles of less than one level-0 pixel.
        ImportError: the C++ extension was not built.
    """
    _check_arguments(info, tissue, tile_px, token_px, spacing_um, min_token_fraction, masked)
    tile_lv0 = round(tile_px * spacing_um / info.spacing_um)
    if tile_lv0 < 1:
        raise SlideError(
            f"a tile must cover at least one level-0 pixel, got {tile_px} px at {spacing_um:g} µm on a slide of "
            f"{info.spacing_um:g} µm per pixel; check the slide's spacing (`--spacing-um`)"
        )
    side = tile_px // token_px
    token_lv0 = tile_lv0 * token_px / tile_px
    token_rows, token_cols = _tokens_within(info.height_px, token_lv0), _tokens_within(info.width_px, token_lv0)
    rows, cols = math.ceil((token_rows + before[1]) / side), math.ceil((token_cols + before[0]) / side)
    left_lv0, top_lv0 = (tokens * token_lv0 for tokens in before)
    if rows * cols > _MAX_CELLS:
        raise SlideError(
            f"a grid may have up to {_MAX_CELLS:,} tiles, got {rows:,} × {cols:,} for a slide of {info.width_px} × "
            f"{info.height_px} px at {info.spacing_um:g} µm per pixel; check its spacing (`--spacing-um`)"
        )

    keep_HW = np.zeros((rows, cols), bool)
    kept_tokens = []
    band = max(1, _BAND_TOKENS // (cols * side * side))
    for top in range(0, rows, band):
        band_rows = min(band, rows - top)
        keep = _inside(top * side - before[1], band_rows * side, token_rows)[:, None]
        keep = keep & _inside(-before[0], cols * side, token_cols)
        if masked and tissue is not None:
            corner_lv0 = -left_lv0, top * tile_lv0 - top_lv0
            fraction = tissue.token_fractions(*corner_lv0, token_lv0, (keep.shape[0], keep.shape[1]))
            keep &= (fraction > 0) & (fraction >= min_token_fraction)
        tiles = keep.reshape(band_rows, side, cols, side).transpose(0, 2, 1, 3)  # (rows, cols, h, w)
        keep_HW[top : top + band_rows] = tiles.any(axis=(2, 3))
        kept_tokens.append(tiles[keep_HW[top : top + band_rows]])
    row, col = np.nonzero(keep_HW)
    return TokenGrid(
        keep_HW=keep_HW,
        coords_lv0=np.stack((col, row), axis=1).astype(np.int64) * tile_lv0 - (round(left_lv0), round(top_lv0)),
        token_keep_THW=np.concatenate(kept_tokens),
        tile_px=tile_px,
        token_px=token_px,
        spacing_um=float(spacing_um),
        tile_lv0=tile_lv0,
        width_px=info.width_px,
        height_px=info.height_px,
    )


def _tokens_within(length_px: int, token_lv0: float) -> int:
    """Return the number of tokens along an axis whose centre is inside the slide, at least one."""
    return max(1, math.floor(length_px / token_lv0 + 0.5))


def _inside(first: int, count: int, end: int) -> np.ndarray:
    tokens = np.arange(first, first + count)
    return (tokens >= 0) & (tokens < end)


def _check_arguments(
    info: SlideInfo,
    tissue: TissueMask | None,
    tile_px: int,
    token_px: int,
    spacing_um: float,
    min_token_fraction: float,
    masked: bool,
) -> None:
    if tile_px < 1 or token_px < 1 or tile_px % token_px:
        raise ValueError(
            f"make_grid needs token_px to divide tile_px, got tile_px={tile_px}, token_px={token_px}; use the model's"
        )
    if not (math.isfinite(spacing_um) and spacing_um > 0):
        raise ValueError(f"make_grid needs a spacing above 0, got spacing_um={spacing_um}; use the model's")
    if not 0.0 <= min_token_fraction <= 1.0:
        raise ValueError(
            f"make_grid needs a fraction of 0 to 1, got min_token_fraction={min_token_fraction}; 0 keeps any tissue"
        )
    if tissue is None:
        if masked:
            raise ValueError(
                "make_grid needs the tissue mask of a masked grid, got tissue=None; find_tissue or load_mask makes one"
            )
        return
    height, width = tissue.mask_HW.shape
    covered = (width * tissue.px_lv0[0], height * tissue.px_lv0[1])
    if abs(covered[0] - info.width_px) > 1 or abs(covered[1] - info.height_px) > 1:
        raise ValueError(
            f"make_grid needs the mask of the same slide, got one that covers {covered[0]:.0f} × {covered[1]:.0f} "
            f"level-0 pixels of a slide of {info.width_px} × {info.height_px}; find or load it with this slide's info"
        )

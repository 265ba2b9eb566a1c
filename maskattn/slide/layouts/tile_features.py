"""The metadata, coordinates and features of a slide's tiles, in one form for the files of all tools.

Coordinates are int64 level-0 pixels, x before y, of each tile's top left corner; features are float32 or float16. A
field that a file does not state is None: no default is assumed.

Dimension key: T tiles, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from maskattn.shapes import Float, Int

if TYPE_CHECKING:
    from maskattn.slide.grid import TokenGrid
    from maskattn.slide.reader import SlideInfo

__all__ = ["TileCoords", "TileFeatures", "TileHeader", "TokenMask"]

TokenMask = Literal["none", "tissue"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TileHeader:
    """The metadata that all tiles of a slide share.

    Attributes:
        slide_id: the slide's id.
        patch_size_px: side of a tile in pixels, as it was cut out for the encoder.
        patch_size_lv0: side of a tile in level-0 pixels.
        spacing_um: µm per pixel of a tile, as it was cut out.
        overlap_px: overlap of neighbouring tiles, in pixels of a tile.
        width_px: width of the slide in level-0 pixels.
        height_px: height of the slide in level-0 pixels.
        spacing_lv0_um: µm per level-0 pixel.
        magnification: magnification of the objective that scanned the slide.
        encoder: the name of the encoder.
        token_mask: "none" if every token of a tile took part, "tissue" if background tokens were left out; None if the
            file does not say, as with all other tools.
        slide_path: the slide's file, or its URL.
    """

    slide_id: str
    patch_size_px: int | None = None
    patch_size_lv0: int | None = None
    spacing_um: float | None = None
    overlap_px: int = 0
    width_px: int | None = None
    height_px: int | None = None
    spacing_lv0_um: float | None = None
    magnification: float | None = None
    encoder: str | None = None
    token_mask: TokenMask | None = None
    slide_path: Path | str | None = None

    @classmethod
    def of_grid(
        cls,
        slide_id: str,
        info: SlideInfo,
        grid: TokenGrid,
        *,
        encoder: str | None = None,
        token_mask: TokenMask | None = None,
    ) -> TileHeader:
        """Return the header of the tiles of a slide's grid."""
        return cls(
            slide_id=slide_id,
            patch_size_px=grid.tile_px,
            patch_size_lv0=grid.tile_lv0,
            spacing_um=grid.spacing_um,
            width_px=info.width_px,
            height_px=info.height_px,
            spacing_lv0_um=info.spacing_um,
            magnification=info.objective_power,
            encoder=encoder,
            token_mask=token_mask,
            slide_path=info.path,
        )

    @property
    def overlap_lv0(self) -> int | None:
        """Overlap of neighbouring tiles in level-0 pixels."""
        if not self.overlap_px:
            return 0
        if self.patch_size_px is None or self.patch_size_lv0 is None:
            return None
        return round(self.overlap_px * self.patch_size_lv0 / self.patch_size_px)


@dataclass(frozen=True, eq=False, kw_only=True)
class TileCoords(TileHeader):
    """The positions of a slide's tiles.

    Attributes:
        coords_T2: (T, 2) int64, x and y of each tile's top left corner.
        on_level0: True if ``coords_T2`` and ``patch_size_lv0`` are in level-0 pixels. False if they are in pixels of
            ``spacing_um``, because the file states only µm, as STAMP's do, and the slide was not given.
        layout: the name of the file's layout.
        source: the path of the file.
    """

    coords_T2: Int[np.ndarray, "T 2"]
    on_level0: bool = True
    layout: str
    source: Path


@dataclass(frozen=True, eq=False, kw_only=True)
class TileFeatures(TileCoords):
    """Tile features with their positions.

    Attributes:
        features_TC: (T, C) float32 or float16, finite.
    """

    features_TC: Float[np.ndarray, "T C"]

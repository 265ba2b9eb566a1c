"""What a file of tile features holds, whichever tool wrote it: the header, places and features of a slide's tiles.

Coordinates are level-0 pixels, x before y, of each tile's top left corner, and int64; features are float32 or
float16. Where a file leaves something open, the field is None: nothing is made up.

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
    """The facts that hold for all tiles of a slide.

    Attributes:
        slide_id: the slide's id.
        patch_size_px: side of a tile in pixels, as it was cut out for the encoder.
        patch_size_lv0: side of a tile in level-0 pixels.
        spacing_um: µm per pixel of a tile, as it was cut out.
        overlap_px: of neighbouring tiles, in a tile's pixels.
        width_px: width of the slide's level 0.
        height_px: height of the slide's level 0.
        spacing_lv0_um: µm per pixel of the slide's level 0.
        magnification: of the objective that scanned the slide.
        encoder: the name of the encoder.
        token_mask: "none" where every token of a tile took part, "tissue" where background tokens were left out; None
            where the file does not say it, as no other tool's does.
        slide_path: the slide's file.
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
    slide_path: Path | None = None

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
        """The header of the tiles of a slide's grid."""
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
    """Where a slide's tiles lie.

    Attributes:
        coords_T2: (T, 2) int64, x and y of each tile's top left corner.
        on_level0: True = ``coords_T2`` and ``patch_size_lv0`` are pixels of the slide's level 0. False = they are
            pixels of ``spacing_um``: the file has µm alone, as STAMP's have, and the slide was not given.
        layout: whose file it was.
        source: the file.
    """

    coords_T2: Int[np.ndarray, "T 2"]
    on_level0: bool = True
    layout: str
    source: Path


@dataclass(frozen=True, eq=False, kw_only=True)
class TileFeatures(TileCoords):
    """Tile features with their places.

    Attributes:
        features_TC: (T, C) float32 or float16, finite.
    """

    features_TC: Float[np.ndarray, "T C"]

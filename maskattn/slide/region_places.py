"""The positions of regions' patches, which are encoded one by one and stored region by region.

A region with ``side`` patches along a side covers ``region_lv0 = round(side · patch_px · spacing_um / slide spacing)``
level-0 pixels; regions are laid from the slide's corner and kept if they show tissue. If background tokens are left
out, so are patches without tissue; otherwise every patch of a kept region takes part.

Dimension key: T patches.
"""

from __future__ import annotations

import math

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.layouts.tile_features import TokenMask
from maskattn.slide.reader import SlideInfo
from maskattn.slide.tile_places import TilePlaces, tissue_share
from maskattn.slide.tissue import TissueMask

__all__ = ["lay_region_patches"]

_MAX_PATCHES = 20_000_000


def lay_region_patches(
    info: SlideInfo,
    tissue: TissueMask,
    *,
    patch_px: int,
    side: int,
    spacing_um: float,
    tile_px: int,
    min_tissue: float = 0.0,
    token_mask: TokenMask = "none",
) -> TilePlaces:
    """Lay regions over a slide from its level-0 corner, row by row, and return the patches of those with tissue.

    Args:
        info: the slide's size and spacing.
        tissue: the tissue mask.
        patch_px: side of a patch in pixels at ``spacing_um``.
        side: the number of patches along a side of a region.
        spacing_um: µm per pixel of a patch.
        tile_px: side of the image that a patch is read as.
        min_tissue: smallest tissue fraction of a kept region, 0 to 1; 0 keeps any tissue.
        token_mask: "tissue" leaves out patches without tissue.

    Returns:
        The patches, region by region, row-major in each region.

    Raises:
        SlideError: a patch would cover less than a level-0 pixel, or there would be more than 20 million.
    """
    region_lv0 = round(side * patch_px * spacing_um / info.spacing_um)
    patch_lv0 = round(patch_px * spacing_um / info.spacing_um)
    if patch_lv0 < 1:
        raise SlideError(
            f"a patch must cover at least one level-0 pixel, got {patch_px} px at {spacing_um:g} µm on a slide of "
            f"{info.spacing_um:g} µm per pixel; check the slide's spacing (`--slide-spacing-um`)"
        )
    cols, rows = (math.ceil(length / region_lv0) for length in (info.width_px, info.height_px))
    cells = rows * cols * side * side
    if cells > _MAX_PATCHES:
        raise SlideError(
            f"a slide may have up to {_MAX_PATCHES:,} patches, got {cells:,} for {info.width_px} × {info.height_px} px "
            f"at {info.spacing_um:g} µm per pixel; check its spacing (`--slide-spacing-um`)"
        )
    corners = np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), axis=-1).reshape(-1, 2).astype(np.int64)
    corners = corners * region_lv0
    share_R = tissue_share(tissue, corners, region_lv0)[:, 0, 0]
    corners = corners[(share_R > 0) & (share_R >= min_tissue)]
    steps = np.rint(np.arange(side) * (region_lv0 / side)).astype(np.int64)
    offsets = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    coords_T2 = (corners[:, None] + offsets).reshape(-1, 2)
    share_T = tissue_share(tissue, coords_T2, patch_lv0)[:, 0, 0]
    if token_mask == "tissue":
        coords_T2, share_T = coords_T2[share_T > 0], share_T[share_T > 0]
    return TilePlaces(coords_T2, patch_lv0, tile_px, cells, share_T)

"""Training samples: synthetic slides cut into tiles by the rules of inference.

:class:`ArrayReader` holds a slide in memory and has the interface of :class:`maskattn.slide.reader.SlideReader`, so
that tissue detection and the token grid are those of the pipeline.

Dimension key: T kept tiles of a slide, (H, W) its grid of tiles, (h, w) the tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np

from maskattn.demo.synthetic import CLASSES, SyntheticSlide, make_slide
from maskattn.shapes import Bool, Float, UInt8
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.tissue import find_tissue

__all__ = ["KINDS", "TILE_PX", "TOKEN_PX", "ArrayReader", "SlideSample", "sample_slide", "token_shares"]

TILE_PX = 128
TOKEN_PX = 16
KINDS = ("glass", *CLASSES)


class ArrayReader:
    """A synthetic slide in memory with the interface of ``SlideReader``."""

    notes = ()

    def __init__(self, slide: SyntheticSlide) -> None:
        self.image_HW3 = slide.image_HW3
        height, width = slide.image_HW3.shape[:2]
        self.info = SlideInfo(
            path=Path("synthetic.tiff"),
            width_px=width,
            height_px=height,
            level_dimensions=((width, height),),
            level_downsamples=((1.0, 1.0),),
            spacing_um=slide.spacing_um,
            spacing_source="metadata",
            vendor=None,
            objective_power=None,
            properties={},
        )

    def read_region(
        self, x_lv0: int, y_lv0: int, size_lv0: tuple[int, int], out_px: tuple[int, int], *, tolerant: bool = False
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Read a rectangle as (H, W, 3) uint8 RGB; white outside the slide."""
        region = np.full((size_lv0[1], size_lv0[0], 3), 255, np.uint8)
        inside = self.image_HW3[max(y_lv0, 0) : y_lv0 + size_lv0[1], max(x_lv0, 0) : x_lv0 + size_lv0[0]]
        top, left = max(-y_lv0, 0), max(-x_lv0, 0)
        region[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return region if out_px == size_lv0 else cv2.resize(region, out_px, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class SlideSample:
    """A slide as the model sees it, with its ground truth.

    Attributes:
        grid: the tiles and tokens that take part.
        tiles_TCHW: (T, 3, 128, 128) uint8, the kept tiles in row-major order.
        kinds_TKHW: (T, 4, h, w), share of each of :data:`KINDS` in each token; they sum to 1.
        lesion_THW: (T, h, w), share of each token that is lesion.
        label: the slide's class, an index into ``CLASSES``.
    """

    grid: TokenGrid
    tiles_TCHW: UInt8[np.ndarray, "T 3 P P"]
    kinds_TKHW: Float[np.ndarray, "T 4 h w"]
    lesion_THW: Float[np.ndarray, "T h w"]
    label: int


def sample_slide(seed: int, *, masked: bool = True, label: int | None = None) -> SlideSample:
    """Draw a synthetic slide and cut it as ``maskattn infer`` does; ``masked=False`` keeps all tiles and tokens."""
    slide = make_slide(seed, label)
    reader = ArrayReader(slide)
    tissue = find_tissue(cast(SlideReader, reader))  # it uses only info and read_region, which both readers have
    grid = make_grid(
        reader.info, tissue, tile_px=TILE_PX, token_px=TOKEN_PX, spacing_um=slide.spacing_um, masked=masked
    )
    lesion = tile_tokens(token_shares(slide.lesion_HW))[grid.keep_HW]
    flesh = np.maximum(tile_tokens(token_shares(slide.tissue_HW))[grid.keep_HW], lesion)
    shares = np.zeros((len(lesion), len(KINDS), *lesion.shape[1:]), np.float32)
    shares[:, 0], shares[:, 1] = 1 - flesh, flesh - lesion
    shares[:, 1 + slide.label] += lesion
    return SlideSample(grid, cut_tiles(reader, grid), shares, lesion, slide.label)


def cut_tiles(reader: ArrayReader, grid: TokenGrid) -> UInt8[np.ndarray, "T 3 P P"]:
    """Return the kept tiles of a slide at the model's spacing, channels first."""
    size = (grid.tile_lv0, grid.tile_lv0)
    tiles = np.empty((len(grid.coords_lv0), 3, TILE_PX, TILE_PX), np.uint8)
    for tile, (x, y) in zip(tiles, grid.coords_lv0.tolist(), strict=True):
        tile[:] = reader.read_region(x, y, size, (TILE_PX, TILE_PX)).transpose(2, 0, 1)
    return tiles


def token_shares(mask_HW: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "rows cols"]:
    """Compute the share of each 16 px token that the mask covers; pixels beyond the slide's edge count as 0."""
    height, width = mask_HW.shape
    rows, cols = -(-height // TILE_PX) * TILE_PX, -(-width // TILE_PX) * TILE_PX
    padded = np.zeros((rows, cols), np.uint8)
    padded[:height, :width] = mask_HW.astype(np.uint8) * 255
    shares = cv2.resize(padded, (cols // TOKEN_PX, rows // TOKEN_PX), interpolation=cv2.INTER_AREA)
    return shares.astype(np.float32) / 255


def tile_tokens(tokens_RC: Float[np.ndarray, "rows cols"]) -> Float[np.ndarray, "H W h w"]:
    """Group a slide's token grid by tile."""
    side = TILE_PX // TOKEN_PX
    rows, cols = tokens_RC.shape[0] // side, tokens_RC.shape[1] // side
    return tokens_RC.reshape(rows, side, cols, side).transpose(0, 2, 1, 3)

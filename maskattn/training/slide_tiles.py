"""The tiles of labelled slides on which an encoder is trained: laid over the tissue once, and read on demand.

Tiles are laid as by ``maskattn extract``. For each slide their corners and the kept tokens, one bit each, are in
memory; only a few slides are open at a time.

Dimension key: T tiles of a slide; h, w tokens of a tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.shapes import Bool, Int
from maskattn.slide.extract_request import ExtractSettings, tile_geometry
from maskattn.slide.extraction_tiles import find_tiles
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text
from maskattn.slide.reader import SlideReader
from maskattn.slide.slide_run import Stages
from maskattn.training.encoder_to_tune import encoder_to_tune
from maskattn.training.settings import TrainSettings

__all__ = ["LaidSlides", "SlideTiles", "lay_slides"]

_PROBED = 3


@dataclass(frozen=True, eq=False)
class SlideTiles:
    """The tiles of a slide over its tissue.

    Attributes:
        path: the slide file.
        coords_lv0: (T, 2) x and y of each tile's top left corner in level-0 pixels.
        tile_lv0: side of a tile in level-0 pixels.
        tile_px: side of a tile's image in pixels.
        side: number of tokens along a side of a tile.
        kept_bits: (T, bytes) the kept tokens of each tile, eight to a byte; None if all take part.
    """

    path: Path
    coords_lv0: Int[np.ndarray, "T 2"]
    tile_lv0: int
    tile_px: int
    side: int
    kept_bits: np.ndarray | None

    def __len__(self) -> int:
        return len(self.coords_lv0)

    def keep(self, row: int) -> Bool[Tensor, "h w"] | None:
        """Return the kept tokens (h, w) of a tile; None if all take part."""
        if self.kept_bits is None:
            return None
        bits = np.unpackbits(self.kept_bits[row], count=self.side**2)
        return torch.from_numpy(bits.reshape(self.side, self.side).astype(bool))

    def read(self, reader: SlideReader, row: int) -> Tensor:
        """Read a tile's pixels, (3, X, Y) uint8.

        Raises:
            SlideError: the tile cannot be decoded.
        """
        x, y = self.coords_lv0[row].tolist()
        rgb = reader.read_region(x, y, (self.tile_lv0, self.tile_lv0), (self.tile_px, self.tile_px))
        return torch.from_numpy(rgb).permute(2, 0, 1)

    def digest(self) -> str:
        """Return the SHA-256 of the tiles' positions and kept tokens."""
        found = hashlib.sha256(np.ascontiguousarray(self.coords_lv0, np.int64).tobytes())
        found.update(f"{self.tile_lv0} {self.tile_px}".encode())
        found.update(b"" if self.kept_bits is None else self.kept_bits.tobytes())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class LaidSlides:
    """The tiles of all slides.

    Attributes:
        encoder: the encoder for which they were laid.
        tiles: slide → its tiles.
        unusable: slide → the reason why it has none.
        patch_px: side of a tile in pixels at ``spacing_um``.
        spacing_um: µm per pixel of the tiles.
    """

    encoder: TileEncoder
    tiles: dict[str, SlideTiles]
    unusable: dict[str, str]
    patch_px: int
    spacing_um: float


def lay_slides(
    jobs: Mapping[str, SlideJob], settings: TrainSettings, on_slide: Callable[[str, int, int], None] | None = None
) -> LaidSlides:
    """Find the tissue of slides and lay tiles over it; a slide that cannot be used does not affect the others.

    Each slide is decoded in a separate process, and its first, middle and last tile are read as a test.

    Args:
        jobs: slide → its file, mask and spacing.
        settings: the settings of the training.
        on_slide: called as on_slide(slide, number done, number of slides).

    Raises:
        ValueError: there is no encoder, it cannot be fine-tuned, or neither it nor the settings have a spacing.
    """
    encoder = encoder_to_tune(settings)
    asked = ExtractSettings(
        settings.out or Path(),
        token_mask=settings.token_mask or "none",
        target_spacing_um=settings.spacing_um,
        patch_px=settings.patch_px,
    )
    patch_px, _, spacing_um = tile_geometry(asked, encoder)
    tiles, unusable = {}, {}
    for done, (slide_id, job) in enumerate(jobs.items(), 1):
        try:
            tiles[slide_id] = _laid(job, encoder, asked)
        except Exception as error:  # whatever is wrong with one slide
            known = isinstance(error, SlideError)
            unusable[slide_id] = as_text(" ".join(str(error if known else f"{type(error).__name__}: {error}").split()))
        if on_slide is not None:
            on_slide(slide_id, done, len(jobs))
    return LaidSlides(encoder, tiles, unusable, patch_px, spacing_um)


def _laid(job: SlideJob, encoder: TileEncoder, asked: ExtractSettings) -> SlideTiles:
    if job.problem is not None:
        raise SlideError(job.problem)
    with SlideReader(job.path, job.spacing_um, "manifest", isolated=True) as reader:
        places = find_tiles(job, reader, encoder, asked, Stages(encoder.device)).places
        bits: Any = None
        if places.token_keep_THW is not None:
            bits = np.packbits(places.token_keep_THW.reshape(places.kept_tiles, -1), axis=1)
        side = encoder.tile_px // encoder.token_px
        tiles = SlideTiles(job.path, places.coords_lv0, places.tile_lv0, places.tile_px, side, bits)
        for row in np.linspace(0, len(tiles) - 1, _PROBED).astype(int):
            tiles.read(reader, int(row))
    return tiles

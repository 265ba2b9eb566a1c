"""Read ``relevance.h5``: the maps of a slide's tiles and, where the run made them, of their tokens.

Dimension key: T tiles, K classes, M = K + 1 maps (the classes', then attention), (h, w) tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Bool, Float, Int
from maskattn.slide.names import as_text

__all__ = ["MapTable", "TileTokens", "open_maps"]

_TILES_AT_A_TIME = 512
_TOKENS = ("tokens/relevance", "tokens/attention", "tokens/keep")


@dataclass(frozen=True, eq=False)
class TileTokens:
    """The token maps of one tile.

    Attributes:
        values_Mhw: (M, h, w) relevance for each class, then attention; NaN where a token is background.
        keep_hw: (h, w) bool, True for kept tokens.
    """

    values_Mhw: Float[np.ndarray, "M h w"]
    keep_hw: Bool[np.ndarray, "h w"]


@dataclass(frozen=True, eq=False)
class MapTable:
    """The maps of one slide.

    Attributes:
        classes: K class names.
        method: the method of explanation, in words.
        coords_T2: (T, 2) level-0 x and y of each tile's top left corner.
        values_MT: (M, T) the tiles' relevance for each class, then their attention.
        tile_lv0: side of a tile in level-0 pixels.
        tile_px: side of a tile in pixels, as the model sees it.
        width_px: width of the slide in level-0 pixels.
        height_px: height of the slide in level-0 pixels.
        tokens_hw: rows and columns of a tile's tokens; None if the run made no token maps.
    """

    classes: tuple[str, ...]
    method: str
    coords_T2: Int[np.ndarray, "T 2"]
    values_MT: Float[np.ndarray, "M T"]
    tile_lv0: int
    tile_px: int
    width_px: int
    height_px: int
    tokens_hw: tuple[int, int] | None
    _file: Any

    @property
    def tiles(self) -> int:
        """The number of tiles, T."""
        return len(self.coords_T2)

    @property
    def step_lv0(self) -> float:
        """Side in level-0 pixels of the smallest area with a value: a token, or a tile without token maps."""
        return self.tile_lv0 / (self.tokens_hw[0] if self.tokens_hw else 1)

    def tile_at(self, x_lv0: float, y_lv0: float) -> int | None:
        """Return the index of the tile that covers a level-0 position, or None."""
        inside = (self.coords_T2 <= (x_lv0, y_lv0)) & (self.coords_T2 + self.tile_lv0 > (x_lv0, y_lv0))
        found = np.flatnonzero(inside.all(axis=1))
        return int(found[-1]) if len(found) else None

    def tokens_of(self, tile: int) -> TileTokens | None:
        """Return the token maps of a tile, or None if the run made none."""
        if self.tokens_hw is None:
            return None
        values = np.concatenate(
            [
                self._file["tokens/relevance"][:, tile],
                (self._file["tokens/attention"][tile] * self.values_MT[-1, tile])[None],
            ]
        )
        keep = self._file["tokens/keep"][tile]
        return TileTokens(np.where(keep, values, np.nan).astype(np.float32), keep)

    def batches(self, index: int) -> Iterator[tuple[slice, Float[np.ndarray, "B h w"]]]:
        """Yield one map in batches of tiles: a slice of the tiles, and their (B, h, w) values, NaN at background.

        Args:
            index: index of the map, 0 to K; K is attention.
        """
        for first in range(0, self.tiles, _TILES_AT_A_TIME):
            batch = slice(first, min(first + _TILES_AT_A_TIME, self.tiles))
            if self.tokens_hw is None:
                yield batch, self.values_MT[index, batch, None, None]
                continue
            if index < len(self.classes):
                values = self._file["tokens/relevance"][index, batch]
            else:
                values = self._file["tokens/attention"][batch] * self.values_MT[-1, batch, None, None]
            yield batch, np.where(self._file["tokens/keep"][batch], values, np.float32(np.nan))


@contextmanager
def open_maps(path: Path) -> Iterator[MapTable]:
    """Open a slide's ``relevance.h5``; token maps are read from the file on demand while it is open.

    Raises:
        SlideError: the file is missing or incomplete.
    """
    import h5py

    with ExitStack() as opened:
        try:
            table = _table(opened.enter_context(h5py.File(path, "r")))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise SlideError(
                f"a slide's maps must be a relevance.h5 of this package, got {as_text(path)}: "
                f"{as_text(' '.join(str(error).split()))}; run the slide again with --overwrite"
            ) from error
        yield table


def _refuse_other_files(file: Any, name: str) -> None:
    """Refuse links and external storage: HDF5 can point to any other file, and tables of this package never do."""
    import h5py

    steps = name.split("/")
    links = [file.get("/".join(steps[:end]), getlink=True) for end in range(1, len(steps) + 1)]
    if not all(isinstance(link, h5py.HardLink) for link in links) or file[name].external or file[name].is_virtual:
        raise ValueError(f"{name} lies in another file")


def _table(file: Any) -> MapTable:
    for name in ("coords", "classes", "tiles/relevance", "tiles/attention", *_TOKENS):
        if name in file or name not in _TOKENS:
            _refuse_other_files(file, name)
    attributes = file["coords"].attrs
    relevance = np.asarray(file["tiles/relevance"], dtype=np.float32)
    attention = np.asarray(file["tiles/attention"], dtype=np.float32)
    coords = np.asarray(file["coords"], dtype=np.int64)
    classes = tuple(file["classes"].asstr()[...].tolist())
    if coords.shape != (len(attention), 2) or relevance.shape != (len(classes), len(coords)):
        raise ValueError(
            f"its tables are of different lengths, coords.shape={coords.shape} and relevance.shape={relevance.shape}"
        )
    return MapTable(
        classes=classes,
        method=str(file.attrs["method"]),
        coords_T2=coords,
        values_MT=np.concatenate([relevance, attention[None]]),
        tile_lv0=int(attributes["patch_size_level0"]),
        tile_px=int(attributes["patch_size"]),
        width_px=int(attributes["level0_width"]),
        height_px=int(attributes["level0_height"]),
        tokens_hw=tuple(file["tokens/keep"].shape[1:]) if "tokens" in file else None,
        _file=file,
    )

"""``relevance.h5``: raw signed relevance of tiles and tokens, in a file that is written completely or not at all.

Its ``coords`` are those of ``features.h5``, which has TRIDENT's layout (:mod:`maskattn.slide.layouts`).

Dimension key: T tiles, K classes, (h, w) tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.shapes import Float, Int
from maskattn.slide.h5_files import writing_h5
from maskattn.slide.layouts.tile_features import TileHeader
from maskattn.slide.layouts.trident import write_geometry

__all__ = ["WriteTokens", "relevance_table"]

_TILES_PER_CHUNK = 64

WriteTokens = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
"""Takes indices (B,), relevance (K, B, h, w), attention (B, h, w) and keep (B, h, w) bool of a batch of tiles."""


@contextmanager
def relevance_table(
    path: Path,
    classes: tuple[str, ...],
    relevance_KT: Float[np.ndarray, "K T"],
    attention_T: Float[np.ndarray, " T"],
    coords_T2: Int[np.ndarray, "T 2"],
    header: TileHeader,
    method: str,
    tokens_hw: tuple[int, int] | None = None,
) -> Iterator[WriteTokens]:
    """Write raw signed relevance: ``tiles/relevance`` (K, T), ``tiles/attention`` (T,), ``coords``, ``classes``.

    The context yields a function that writes the token maps of a batch of tiles to ``tokens/relevance`` (K, T, h, w),
    ``tokens/attention`` (T, h, w) and ``tokens/keep`` (T, h, w). The file gets its name when the context ends.

    Args:
        path: the final path of the file.
        classes: the names of the K classes.
        relevance_KT: (K, T) signed score of each tile for each class.
        attention_T: (T,) attention of the slide model to each tile.
        coords_T2: (T, 2) level-0 x, y of each tile's top left corner.
        header: the metadata that all of the slide's tiles share.
        method: the title of the method of explanation.
        tokens_hw: rows and columns of a tile's tokens; None without token maps.

    Raises:
        OSError: the file cannot be written.
    """
    import h5py

    with writing_h5(path) as file:
        file.attrs["method"] = f"{method}: raw signed scores, 0 where background"
        file.create_dataset("classes", data=list(classes), dtype=h5py.string_dtype())
        coords = file.create_dataset("coords", data=np.asarray(coords_T2, dtype=np.int64))
        if None in (header.patch_size_px, header.patch_size_lv0, header.width_px, header.height_px):
            coords.attrs.update({"name": header.slide_id, "patch_size_level0": header.patch_size_lv0 or 0})
        else:
            write_geometry(coords, header)
        file.create_dataset("tiles/relevance", data=np.asarray(relevance_KT, dtype=np.float32))
        file.create_dataset("tiles/attention", data=np.asarray(attention_T, dtype=np.float32))
        yield _no_tokens if tokens_hw is None else _token_datasets(file, len(classes), len(coords_T2), *tokens_hw)


def _token_datasets(file: Any, K: int, T: int, h: int, w: int) -> WriteTokens:
    chunk = max(1, min(T, _TILES_PER_CHUNK))
    # Background is long runs of zeros, which the lightest compression already removes.
    compressed = {"compression": "gzip", "compression_opts": 1}
    relevance = file.create_dataset("tokens/relevance", (K, T, h, w), np.float32, chunks=(1, chunk, h, w), **compressed)
    attention = file.create_dataset("tokens/attention", (T, h, w), np.float32, chunks=(chunk, h, w), **compressed)
    keep = file.create_dataset("tokens/keep", (T, h, w), bool, chunks=(chunk, h, w), **compressed)

    def write(tiles_B: np.ndarray, relevance_KBhw: np.ndarray, attention_Bhw: np.ndarray, keep_Bhw: np.ndarray) -> None:
        relevance[:, tiles_B], attention[tiles_B], keep[tiles_B] = relevance_KBhw, attention_Bhw, keep_Bhw

    return write


def _no_tokens(*maps: np.ndarray) -> None:
    raise AssertionError("a table without tokens takes no token maps")

"""Tables: ``features.h5`` and ``relevance.h5``, each whole or not there at all.

``features.h5`` has TRIDENT's layout, so that its tools read ours: datasets ``features`` (T, C) and ``coords`` (T, 2) in
level-0 pixels, whose attributes tell the geometry. :func:`read_features` reads that layout, CLAM's and STAMP's.

Dimension key: T tiles, C channels, K classes, (h, w) tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from maskattn.files import replacing
from maskattn.shapes import Float, Int, Shaped

if TYPE_CHECKING:
    from maskattn.slide.grid import TokenGrid
    from maskattn.slide.reader import SlideInfo

__all__ = [
    "FeatureTable",
    "TileGeometry",
    "WriteTokens",
    "read_features",
    "relevance_table",
    "write_features",
]

_TILES_PER_CHUNK = 64

WriteTokens = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class TileGeometry:
    """Where tiles lie, in TRIDENT's words.

    Attributes:
        patch_size: side of a tile in pixels, as the model sees it.
        patch_size_level0: side of a tile in level-0 pixels.
        level0_magnification: of the slide's level 0.
        target_magnification: at which the tiles were read.
        level0_width: of the slide, in pixels.
        level0_height: of the slide, in pixels.
        overlap: between neighbouring tiles, in pixels.
    """

    patch_size: int
    patch_size_level0: int
    level0_magnification: float
    target_magnification: float
    level0_width: int
    level0_height: int
    overlap: int = 0

    @classmethod
    def of(cls, info: SlideInfo, grid: TokenGrid) -> TileGeometry:
        """The geometry of a slide's grid; without the objective's power, 10x stands for 1 µm per pixel."""
        level0_magnification = info.objective_power or 10.0 / info.spacing_um
        return cls(
            patch_size=grid.tile_px,
            patch_size_level0=grid.tile_lv0,
            level0_magnification=level0_magnification,
            target_magnification=level0_magnification * grid.tile_px / grid.tile_lv0,
            level0_width=info.width_px,
            level0_height=info.height_px,
        )


def write_features(
    path: Path,
    features_TC: Float[np.ndarray, "T C"],
    coords_T2: Int[np.ndarray, "T 2"],
    geometry: TileGeometry,
    name: str,
) -> None:
    """Write tile embeddings in TRIDENT's layout.

    Args:
        path: where to.
        features_TC: (T, C) embeddings.
        coords_T2: (T, 2) level-0 x, y of each tile's top left corner.
        geometry: of the tiles.
        name: the slide's.

    Raises:
        OSError: the file cannot be written.
    """
    import h5py

    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=np.asarray(features_TC, dtype=np.float32)).attrs["name"] = name
        _write_coords(file, coords_T2, geometry, name)


@contextmanager
def relevance_table(
    path: Path,
    classes: tuple[str, ...],
    relevance_KT: Float[np.ndarray, "K T"],
    attention_T: Float[np.ndarray, " T"],
    coords_T2: Int[np.ndarray, "T 2"],
    geometry: TileGeometry,
    name: str,
    method: str,
    tokens_hw: tuple[int, int] | None = None,
) -> Iterator[WriteTokens]:
    """Write raw signed relevance: ``tiles/relevance`` (K, T), ``tiles/attention`` (T,), ``coords``, ``classes``.

    The context gives the function that writes the token maps of some tiles, by (their indices (B,), relevance
    (K, B, h, w), attention (B, h, w), keep (B, h, w)), to ``tokens/relevance`` (K, T, h, w), ``tokens/attention``
    (T, h, w) and ``tokens/keep`` (T, h, w). The file has its name when the context ends.

    Args:
        path: where to.
        classes: K names.
        relevance_KT: (K, T) signed score of each tile for each class.
        attention_T: (T,) attention of the slide's class token to each tile.
        coords_T2: (T, 2) level-0 x, y of each tile's top left corner.
        geometry: of the tiles.
        name: the slide's.
        method: the title of the method of explanation.
        tokens_hw: rows and columns of a tile's tokens; None where there are no maps of tokens.

    Raises:
        OSError: the file cannot be written.
    """
    import h5py

    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["method"] = f"{method}: raw signed scores, 0 where background"
        file.create_dataset("classes", data=list(classes), dtype=h5py.string_dtype())
        _write_coords(file, coords_T2, geometry, name)
        file.create_dataset("tiles/relevance", data=np.asarray(relevance_KT, dtype=np.float32))
        file.create_dataset("tiles/attention", data=np.asarray(attention_T, dtype=np.float32))
        yield _no_tokens if tokens_hw is None else _token_datasets(file, len(classes), len(coords_T2), *tokens_hw)


def _token_datasets(file: Any, K: int, T: int, h: int, w: int) -> WriteTokens:
    chunk = max(1, min(T, _TILES_PER_CHUNK))
    # Background is zeros in long runs: the lightest compression already folds it away.
    folded = {"compression": "gzip", "compression_opts": 1}
    relevance = file.create_dataset("tokens/relevance", (K, T, h, w), np.float32, chunks=(1, chunk, h, w), **folded)
    attention = file.create_dataset("tokens/attention", (T, h, w), np.float32, chunks=(chunk, h, w), **folded)
    keep = file.create_dataset("tokens/keep", (T, h, w), bool, chunks=(chunk, h, w), **folded)

    def write(tiles_B: np.ndarray, relevance_KBhw: np.ndarray, attention_Bhw: np.ndarray, keep_Bhw: np.ndarray) -> None:
        relevance[:, tiles_B], attention[tiles_B], keep[tiles_B] = relevance_KBhw, attention_Bhw, keep_Bhw

    return write


def _no_tokens(*maps: np.ndarray) -> None:
    raise AssertionError("a table made without tokens takes no maps of them")


def _write_coords(file: Any, coords_T2: np.ndarray, geometry: TileGeometry, name: str) -> None:
    coords = file.create_dataset("coords", data=np.asarray(coords_T2, dtype=np.int64))
    coords.attrs["name"] = name
    coords.attrs["description"] = "level-0 x, y of each tile's top left corner, in pixels; rows first"
    for key, value in vars(geometry).items():
        coords.attrs[key] = value


@dataclass(frozen=True)
class FeatureTable:
    """Tile embeddings as some tool wrote them.

    Attributes:
        layout: whose file it was.
        features_TC: (T, C) float32.
        coords_T2: (T, 2) float64, x and y of each tile in ``unit``.
        unit: "px" (level-0 pixels) or "um".
        tile_size: side of a tile in ``unit``; None where the file does not say (CLAM).
    """

    layout: Literal["trident", "clam", "stamp"]
    features_TC: Float[np.ndarray, "T C"]
    coords_T2: Float[np.ndarray, "T 2"]
    unit: Literal["px", "um"]
    tile_size: float | None


def read_features(path: str | Path) -> FeatureTable:
    """Read tile embeddings of TRIDENT's (ours), CLAM's or STAMP's layout.

    STAMP's first files counted in pixels of 256 µm / 224 px; they come back in µm.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has none of the three layouts.
    """
    import h5py

    with h5py.File(path, "r") as file:
        names = set(file)
        if "coords" not in names or not names & {"features", "feats"}:
            raise ValueError(
                "a feature file must hold coords and features (TRIDENT, CLAM) or feats (STAMP), "
                f"got {', '.join(sorted(names)) or 'nothing'} in {path}"
            )
        coords = np.asarray(file["coords"], dtype=np.float64)
        attributes = {**file.attrs, **file["coords"].attrs}
        features = np.asarray(file["feats" if "feats" in names else "features"], dtype=np.float32)
    # Some TRIDENT and CLAM versions keep a leading batch dimension of 1.
    features = features[0] if features.ndim == 3 else features
    coords = coords[0] if coords.ndim == 3 else coords
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise ValueError(
            "a feature file must hold features (T, C) and coords (T, 2), "
            f"got features.shape={features.shape} and coords.shape={coords.shape} in {path}"
        )
    if "feats" in names:
        return _stamp_table(features, coords, attributes, path)
    if "patch_size_level0" in attributes:
        return FeatureTable("trident", features, coords, "px", float(attributes["patch_size_level0"]))
    return FeatureTable("clam", features, coords, "px", None)


def _stamp_table(
    features: np.ndarray, coords: np.ndarray, attributes: Mapping[str, Any], path: str | Path
) -> FeatureTable:
    tile_size = attributes.get("tile_size_um", attributes.get("tile_size") if attributes.get("unit") == "um" else None)
    if tile_size is not None:
        return FeatureTable("stamp", features, coords, "um", float(tile_size))
    if round(float(attributes.get("tile_size", _stride(coords)))) == 224:
        return FeatureTable("stamp", features, coords * (256 / 224), "um", 256.0)
    raise ValueError(f"a STAMP file must tell tile_size_um or have a stride of 224 px, got neither in {path}")


def _stride(coords: Shaped[np.ndarray, "T 2"]) -> float:
    """The smallest step between two coordinates, 0 where there is none."""
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    return float(steps.min()) if len(steps) else 0.0

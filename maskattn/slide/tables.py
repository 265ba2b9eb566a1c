"""Tables: ``features.h5`` and ``relevance.h5``, each whole or not there at all.

``features.h5`` has TRIDENT's layout, so that its tools read ours: datasets ``features`` (T, C) and ``coords`` (T, 2) in
level-0 pixels, whose attributes tell the geometry. :func:`read_features` reads that layout, CLAM's and STAMP's.

Dimension key: T tiles, C channels, K classes, (h, w) tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maskattn.files import replacing
from maskattn.shapes import Bool, Float, Int, Shaped

__all__ = [
    "FeatureTable",
    "TileGeometry",
    "TokenRows",
    "read_features",
    "write_features",
    "write_relevance",
]

_TILES_PER_CHUNK = 64


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


@dataclass(frozen=True)
class TokenRows:
    """Token-level maps of some tiles: ``rows_B`` says which of the table's T tiles they are."""

    rows_B: Int[np.ndarray, " B"]
    relevance_KBhw: Float[np.ndarray, "K B h w"]
    attention_Bhw: Float[np.ndarray, "B h w"]
    keep_Bhw: Bool[np.ndarray, "B h w"]


def write_relevance(
    path: Path,
    classes: tuple[str, ...],
    relevance_KT: Float[np.ndarray, "K T"],
    attention_T: Float[np.ndarray, " T"],
    coords_T2: Int[np.ndarray, "T 2"],
    geometry: TileGeometry,
    name: str,
    tokens: tuple[tuple[int, int], Iterable[TokenRows]] | None = None,
) -> None:
    """Write raw signed relevance: ``tiles/relevance`` (K, T), ``tiles/attention`` (T,), ``coords``, ``classes``.

    Args:
        path: where to.
        classes: K names.
        relevance_KT: (K, T) signed score of each tile for each class.
        attention_T: (T,) attention of the slide's class token to each tile.
        coords_T2: (T, 2) level-0 x, y of each tile's top left corner.
        geometry: of the tiles.
        name: the slide's.
        tokens: the tokens' grid (h, w) and their maps batch by batch, which are written as they come to
            ``tokens/relevance`` (K, T, h, w), ``tokens/attention`` (T, h, w) and ``tokens/keep`` (T, h, w).

    Raises:
        OSError: the file cannot be written.
    """
    import h5py

    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["method"] = "hierarchical CDAM: raw signed scores, 0 where background"
        file.create_dataset("classes", data=list(classes), dtype=h5py.string_dtype())
        _write_coords(file, coords_T2, geometry, name)
        file.create_dataset("tiles/relevance", data=np.asarray(relevance_KT, dtype=np.float32))
        file.create_dataset("tiles/attention", data=np.asarray(attention_T, dtype=np.float32))
        if tokens is not None:
            (rows, columns), batches = tokens
            _write_tokens(file, (len(classes), len(coords_T2), rows, columns), batches)


def _write_tokens(file: Any, shape_KThw: tuple[int, int, int, int], batches: Iterable[TokenRows]) -> None:
    K, T, h, w = shape_KThw
    chunk = max(1, min(T, _TILES_PER_CHUNK))
    # Background is zeros in long runs: the lightest compression already folds it away.
    relevance = file.create_dataset(
        "tokens/relevance", (K, T, h, w), np.float32, chunks=(1, chunk, h, w), compression="gzip", compression_opts=1
    )
    attention = file.create_dataset(
        "tokens/attention", (T, h, w), np.float32, chunks=(chunk, h, w), compression="gzip", compression_opts=1
    )
    keep = file.create_dataset(
        "tokens/keep", (T, h, w), bool, chunks=(chunk, h, w), compression="gzip", compression_opts=1
    )
    for batch in batches:
        relevance[:, batch.rows_B] = batch.relevance_KBhw
        attention[batch.rows_B] = batch.attention_Bhw
        keep[batch.rows_B] = batch.keep_Bhw


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

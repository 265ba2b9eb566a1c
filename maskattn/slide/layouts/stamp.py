"""STAMP's layout.

``ROOT/<encoder>/<id>.h5`` has ``feats`` (T, C) float16 and ``coords`` (T, 2) float32, in µm from the slide's corner;
the file's attributes are ``stamp_version, extractor, unit ("um"), tile_size_um, tile_size_px, code_hash, feat_type
("tile")``. Names, dtypes and attributes as in version 2.5.0 (KatherLab/STAMP, commit c54ce06:
``stamp/preprocessing/__init__.py``, ``stamp/modeling/data.py``). STAMP refuses a ``stamp_version`` above its own, so
2.1.0 is written, the first with these attributes. Older files are read: ``tile_size`` in µm (2.0), and a stride of 224
that means 256 µm (1.x).

STAMP's files do not state the slide's spacing and size. This package adds attributes that STAMP ignores
(``level0_spacing_um``, ``level0_width``, ``level0_height``, ``overlap``, ``token_mask``); for other files the slide
itself is asked. Without it, coordinates are in pixels of the tiles' own spacing: ``TileCoords.on_level0`` is False.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import maskattn
from maskattn.errors import SlideError
from maskattn.slide.h5_files import writing_h5
from maskattn.slide.layouts import h5_tables
from maskattn.slide.layouts.checks import features_of, whole_coords
from maskattn.slide.layouts.contents import FileContents, opened_h5
from maskattn.slide.layouts.layout import TakeTiles, folder_name, known_fields, writable_id
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures, TileHeader
from maskattn.slide.layouts.trident import token_mask_of
from maskattn.slide.names import as_text

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["Stamp"]

_FORMAT_VERSION = "2.1.0"
_HISTORIC_PX, _HISTORIC_UM = 224, 256.0


class Stamp:
    """STAMP: half-precision features with coordinates in µm."""

    name = "stamp"
    feature_patterns = ("{id}.h5", "*/{id}.h5")
    coords_patterns = ()

    def has_features(self, contents: FileContents) -> bool:
        """Return whether the file has ``feats`` and ``coords``."""
        return {"feats", "coords"} <= contents.names

    def has_coords(self, contents: FileContents) -> bool:
        """Return False: STAMP writes no coordinates without features."""
        return False

    def read_features(self, path: Path, slide: SlideInfo | None, encoder: str | None) -> TileFeatures:
        """Read ``<id>.h5``."""
        places = self.read_coords(path, slide)
        with opened_h5(path) as file:
            table = file["feats"]
            features_TC = h5_tables.rows_of(table, path, None if table.dtype == np.float16 else np.float32)
        return features_of(places, features_TC)

    def read_coords(self, path: Path, slide: SlideInfo | None) -> TileCoords:
        """Read the coordinates, in level-0 pixels if the slide's spacing is known."""
        with opened_h5(path) as file:
            attributes = file.attrs
            coords_um = h5_tables.rows_of(file["coords"], path, np.float64)
            side_um, side_px, to_um = _tile_size(attributes, coords_um, path)
            spacing_um = side_um / side_px if side_px else None
            spacing_lv0 = slide.spacing_um if slide else h5_tables.attribute_float(attributes, "level0_spacing_um")
            pixel_um = spacing_lv0 or spacing_um
            if pixel_um is None:
                raise SlideError(
                    f"a STAMP file, whose coordinates are µm, must say tile_size_px or have its slide named, got "
                    f"neither for {as_text(path)}; name the slide too"
                )
            coords_T2 = whole_coords(np.round(coords_um * (to_um / pixel_um)), path)
            return TileCoords(
                slide_id=path.stem,
                patch_size_px=side_px,
                patch_size_lv0=h5_tables.attribute_int(attributes, "patch_size_level0") or round(side_um / pixel_um),
                spacing_um=spacing_um,
                overlap_px=h5_tables.attribute_int(attributes, "overlap") or 0,
                width_px=h5_tables.attribute_int(attributes, "level0_width"),
                height_px=h5_tables.attribute_int(attributes, "level0_height"),
                spacing_lv0_um=spacing_lv0,
                encoder=h5_tables.attribute_text(attributes, "extractor"),
                token_mask=token_mask_of(attributes),
                coords_T2=coords_T2,
                on_level0=spacing_lv0 is not None,
                layout=self.name,
                source=path,
            )

    def path_of(self, root: Path, header: TileHeader) -> Path:
        """Return the path ``<encoder>/<id>.h5`` below ``root``."""
        return root / folder_name(header.encoder) / f"{header.slide_id}.h5"

    @contextmanager
    def writing(
        self, root: str | Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32
    ) -> Iterator[TakeTiles]:
        """Write the feature file; features are float16 and ``dtype`` is ignored."""

        writable_id(header)
        side_px, spacing_um, spacing_lv0 = known_fields(
            "stamp", header, "patch_size_px", "spacing_um", "spacing_lv0_um"
        )
        final = self.path_of(Path(root), header)
        final.parent.mkdir(parents=True, exist_ok=True)
        with writing_h5(final) as file:
            for name, value in _attributes(header, int(side_px), spacing_um).items():
                if value is not None:
                    file.attrs[name] = value
            coords = h5_tables.growing_table(file, "coords", 2, np.float32)
            features = h5_tables.growing_table(file, "feats", channels, np.float16)

            def take(features_BC: np.ndarray, coords_B2: np.ndarray, tissue_B: np.ndarray | None = None) -> None:
                h5_tables.append_rows(features, _halved(features_BC, header.slide_id))
                h5_tables.append_rows(coords, (np.asarray(coords_B2) * spacing_lv0).astype(np.float32))

            yield take


def _attributes(header: TileHeader, side_px: int, spacing_um: float) -> dict[str, Any]:
    return {
        "stamp_version": _FORMAT_VERSION,
        "extractor": header.encoder or "unknown",
        "unit": "um",
        "tile_size_um": float(side_px * spacing_um),
        "tile_size_px": side_px,
        "code_hash": f"maskattn-{maskattn.__version__}",
        "feat_type": "tile",
        "patch_size_level0": header.patch_size_lv0,
        "overlap": header.overlap_px or None,
        "level0_width": header.width_px,
        "level0_height": header.height_px,
        "level0_spacing_um": header.spacing_lv0_um,
        "token_mask": header.token_mask,
    }


def _halved(features_BC: np.ndarray, slide_id: str) -> np.ndarray:
    """Convert features to float16, as STAMP stores them.

    Raises:
        ValueError: a finite value would overflow.
    """
    features_BC = np.asarray(features_BC)
    with np.errstate(over="ignore"):
        half_BC = features_BC.astype(np.float16)
    if (np.isinf(half_BC) & np.isfinite(features_BC)).any():
        raise ValueError(
            f"the layout stamp holds features up to ±65,504, as float16 does, got {np.abs(features_BC).max():g} for "
            f"{slide_id!r}; choose another --layout"
        )
    return half_BC


def _tile_size(attributes: Any, coords: np.ndarray, path: Path) -> tuple[float, int | None, float]:
    """Return a tile's side in µm and in pixels, and the µm per unit of the coordinates.

    Raises:
        SlideError: the file does not state them.
    """
    side_px = h5_tables.attribute_int(attributes, "tile_size_px")
    side = h5_tables.attribute_float(attributes, "tile_size")
    if side and h5_tables.attribute_text(attributes, "unit") == "um":
        return side, side_px, 1.0
    if side_um := h5_tables.attribute_float(attributes, "tile_size_um"):
        return side_um, side_px, 1.0
    if round(_stride(coords) if side is None else side) == _HISTORIC_PX:
        return _HISTORIC_UM, _HISTORIC_PX, _HISTORIC_UM / _HISTORIC_PX
    raise SlideError(
        f"a STAMP file must state tile_size_um or have a stride of 224 px, got neither in {as_text(path)}; extract the "
        "slide again"
    )


def _stride(coords: np.ndarray) -> float:
    """Return the smallest step between two coordinates along either axis; 0 for a single tile."""
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    return float(steps.min()) if len(steps) else 0.0

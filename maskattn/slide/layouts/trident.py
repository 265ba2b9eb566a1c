"""TRIDENT's layout, which is also that of this package's ``features.h5``.

``ROOT/{mag}x_{px}px_{overlap}px_overlap/patches/<id>_patches.h5`` has ``coords`` (T, 2) int64 in level-0 pixels with
the geometry as attributes; ``.../features_<encoder>/<id>.h5`` has ``features`` (T, C) and the same ``coords``. Names,
dtypes and attributes as in version 0.3.0 (mahmoodlab/TRIDENT, commit a91fa84: ``trident/IO.py``,
``trident/wsi_objects/WSI.py``).

TRIDENT records magnifications, not spacings, and reads a tile of ``round(patch_size · level0_magnification /
target_magnification)`` level-0 pixels. Magnifications are written so that this is exactly the tile's side. Additional
attributes, which TRIDENT ignores, are ``spacing_um`` and ``level0_spacing_um`` of ``coords``, and ``token_mask`` of
``features``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.slide.h5_files import writing_h5
from maskattn.slide.layouts import h5_tables
from maskattn.slide.layouts.checks import features_of, whole_coords
from maskattn.slide.layouts.contents import FileContents, opened_h5
from maskattn.slide.layouts.layout import TakeTiles, folder_name, known_fields, writable_id
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures, TileHeader, TokenMask

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["Trident", "feature_file", "token_mask_of", "write_geometry"]

_COORDS_ENDING = "_patches"


class Trident:
    """TRIDENT: features and coordinates in HDF5, a folder for each magnification and encoder."""

    name = "trident"
    feature_patterns = (
        "{id}.h5",
        "{id}/features.h5",
        "features_*/{id}.h5",
        "patch_features_*/{id}.h5",
        "*/features_*/{id}.h5",
        "*/patch_features_*/{id}.h5",
    )
    coords_patterns = ("{id}_patches.h5", "patches/{id}_patches.h5", "*/patches/{id}_patches.h5")

    def has_features(self, contents: FileContents) -> bool:
        """Return whether the file has ``features``, and ``coords`` with the attribute ``patch_size_level0``."""
        return "features" in contents.names - contents.groups and "patch_size_level0" in contents.coords_attributes

    def has_coords(self, contents: FileContents) -> bool:
        """Return whether the file has ``coords`` with the attribute ``patch_size_level0``, and no features."""
        return "features" not in contents.names and "patch_size_level0" in contents.coords_attributes

    def read_features(self, path: Path, slide: SlideInfo | None, encoder: str | None) -> TileFeatures:
        """Read ``features_<encoder>/<id>.h5``."""
        places = self.read_coords(path, slide)
        with opened_h5(path) as file:
            table = file["features"]
            return features_of(
                places,
                h5_tables.rows_of(table, path, None if table.dtype == np.float16 else np.float32),
                encoder=h5_tables.attribute_text(table.attrs, "encoder"),
                token_mask=token_mask_of(table.attrs),
            )

    def read_coords(self, path: Path, slide: SlideInfo | None) -> TileCoords:
        """Read ``patches/<id>_patches.h5``, or the coordinates of a feature file."""
        with opened_h5(path) as file:
            attributes = file["coords"].attrs
            coords_T2 = whole_coords(h5_tables.rows_of(file["coords"], path), path)
            target = h5_tables.attribute_float(attributes, "target_magnification")
            return TileCoords(
                slide_id=h5_tables.attribute_text(attributes, "name") or path.stem.removesuffix(_COORDS_ENDING),
                patch_size_px=h5_tables.attribute_int(attributes, "patch_size"),
                patch_size_lv0=h5_tables.attribute_int(attributes, "patch_size_level0"),
                spacing_um=h5_tables.attribute_float(attributes, "spacing_um") or (10 / target if target else None),
                overlap_px=h5_tables.attribute_int(attributes, "overlap") or 0,
                width_px=h5_tables.attribute_int(attributes, "level0_width"),
                height_px=h5_tables.attribute_int(attributes, "level0_height"),
                spacing_lv0_um=h5_tables.attribute_float(attributes, "level0_spacing_um"),
                magnification=h5_tables.attribute_float(attributes, "level0_magnification"),
                coords_T2=coords_T2,
                layout=self.name,
                source=path,
            )

    def path_of(self, root: Path, header: TileHeader) -> Path:
        """Return the path ``{mag}x_{px}px_{overlap}px_overlap/features_<encoder>/<id>.h5`` below ``root``."""
        return _coords_folder(root, header) / f"features_{folder_name(header.encoder)}" / f"{header.slide_id}.h5"

    @contextmanager
    def writing(
        self, root: str | Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32
    ) -> Iterator[TakeTiles]:
        """Write the file of coordinates, which appears first, and the feature file."""
        slide_id, root = writable_id(header), Path(root)
        final = self.path_of(root, header)
        patches = _coords_folder(root, header) / "patches" / f"{slide_id}{_COORDS_ENDING}.h5"
        for path in (final, patches):
            path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder = _coords_folder(root, header)
            take_features = stack.enter_context(feature_file(final, header, channels, dtype, folder))
            take_coords = stack.enter_context(_coords_file(patches, header, folder))

            def take(features_BC: np.ndarray, coords_B2: np.ndarray, tissue_B: np.ndarray | None = None) -> None:
                take_features(features_BC, coords_B2, tissue_B)
                take_coords(coords_B2)

            yield take


@contextmanager
def feature_file(
    path: Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32, folder: Path | None = None
) -> Iterator[TakeTiles]:
    """Write one feature file at any path; the context yields a function that takes a batch of tiles.

    Args:
        path: the file to write, which appears when the context ends.
        header: the metadata of all tiles.
        channels: C.
        dtype: dtype of the features.
        folder: TRIDENT's folder of coordinates, stored as ``savetodir``; None omits the attribute.

    Raises:
        ValueError: the header lacks the size of the tiles or of the slide.
        OSError: the file cannot be written.
    """

    with writing_h5(path) as file:
        features = h5_tables.growing_table(file, "features", channels, dtype)
        features.attrs["name"] = header.slide_id
        if folder is not None:
            features.attrs["savetodir"] = str(path.parent)
        features.attrs["encoder"] = header.encoder or "None"
        if header.token_mask is not None:
            features.attrs["token_mask"] = header.token_mask
        coords = h5_tables.growing_table(file, "coords", 2, np.int64)
        write_geometry(coords, header, folder)

        def take(features_BC: np.ndarray, coords_B2: np.ndarray, tissue_B: np.ndarray | None = None) -> None:
            h5_tables.append_rows(features, np.asarray(features_BC, dtype=dtype))
            h5_tables.append_rows(coords, whole_coords(np.asarray(coords_B2), path))

        yield take


@contextmanager
def _coords_file(path: Path, header: TileHeader, folder: Path) -> Iterator[Any]:

    with writing_h5(path) as file:
        coords = h5_tables.growing_table(file, "coords", 2, np.int64)
        write_geometry(coords, header, folder)
        yield lambda coords_B2: h5_tables.append_rows(coords, coords_B2)


def write_geometry(coords: Any, header: TileHeader, folder: Path | None = None) -> None:
    """Write the geometry of a slide's tiles as the attributes of a dataset of coordinates.

    Args:
        coords: the dataset.
        header: the metadata of all tiles.
        folder: the value of TRIDENT's attribute ``savetodir``; None omits it.

    Raises:
        ValueError: the header lacks the size of the tiles or of the slide.
    """
    side_px, side_lv0, width, height = known_fields(
        "trident", header, "patch_size_px", "patch_size_lv0", "width_px", "height_px"
    )
    magnification = header.magnification or 10 / _spacing_lv0(header)
    geometry = {
        "patch_size": side_px,
        "patch_size_level0": side_lv0,
        "level0_magnification": _integer_if_equal(magnification),
        "target_magnification": _integer_if_equal(magnification * side_px / side_lv0),
        "overlap": header.overlap_px,
        "name": header.slide_id,
        "savetodir": None if folder is None else str(folder),
        "level0_width": width,
        "level0_height": height,
        "spacing_um": header.spacing_um,
        "level0_spacing_um": header.spacing_lv0_um,
    }
    for name, value in geometry.items():
        if value is not None:
            coords.attrs[name] = value


def token_mask_of(attributes: Any) -> TokenMask | None:
    """Return the token mask that the attributes state; None if they state none."""
    stated = h5_tables.attribute_text(attributes, "token_mask") if "token_mask" in attributes else None
    return "none" if stated == "none" else "tissue" if stated == "tissue" else None


def _coords_folder(root: Path, header: TileHeader) -> Path:
    side_px, spacing_um = known_fields("trident", header, "patch_size_px", "spacing_um")
    return root / f"{10 / spacing_um:g}x_{side_px}px_{header.overlap_px}px_overlap"


def _spacing_lv0(header: TileHeader) -> float:
    if header.spacing_lv0_um is not None:
        return header.spacing_lv0_um
    spacing_um, side_px, side_lv0 = known_fields("trident", header, "spacing_um", "patch_size_px", "patch_size_lv0")
    return spacing_um * side_px / side_lv0


def _integer_if_equal(number: float) -> float | int:
    return int(number) if float(number).is_integer() else float(number)

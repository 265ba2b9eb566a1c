"""CLAM's layout.

``ROOT/patches/<id>.h5`` has ``coords`` (T, 2) int64 in level-0 pixels with the attributes ``patch_size, patch_level,
downsample, downsampled_level_dim, level_dim, name, save_path``; ``ROOT/h5_files/<id>.h5`` has ``features`` (T, C)
float32 and ``coords`` (T, 2) int32, without attributes; ``ROOT/pt_files/<id>.pt`` is the features as one tensor.
Names, dtypes and attributes as in mahmoodlab/CLAM, commit 53e2409 (``wsi_core/WholeSlideImage.py``,
``extract_features_fp.py``), which has no version number.

CLAM cuts ``patch_size`` pixels out of the level ``patch_level`` and resizes them for the encoder. This package writes
patches of level 0, which gives the exact position of every tile; additional attributes, which CLAM ignores, are
``patch_size_px``, ``spacing_um`` and ``level0_spacing_um`` of ``coords`` in ``patches``, and ``encoder`` and
``token_mask`` of ``features``.

CLAM's feature files do not state the size of a tile. It is read from the slide's file in ``patches`` next to their
folder; without that file it is the smallest step between tiles, which is CLAM's default step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.files import replacing
from maskattn.slide.h5_files import writing_h5
from maskattn.slide.layouts import h5_tables
from maskattn.slide.layouts.checks import features_of, whole_coords
from maskattn.slide.layouts.contents import FileContents, opened_h5
from maskattn.slide.layouts.layout import TakeTiles, known_fields, writable_id
from maskattn.slide.layouts.tensor_files import TensorSpool, read_tensor
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures, TileHeader
from maskattn.slide.layouts.trident import token_mask_of
from maskattn.slide.names import as_text

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["Clam"]


class Clam:
    """CLAM: features in HDF5 and as tensors, coordinates by pyramid level."""

    name = "clam"
    feature_patterns = ("h5_files/{id}.h5", "pt_files/{id}.pt", "{id}.h5", "{id}.pt")
    coords_patterns = ("patches/{id}.h5", "{id}.h5")

    def has_features(self, contents: FileContents) -> bool:
        """Return whether the file has ``features``, and ``coords`` without a tile's size, or is in ``pt_files``."""
        if contents.kind == "pt":
            return contents.path.parent.name == "pt_files"
        return (
            "features" in contents.names - contents.groups
            and contents.coords_columns == 2
            and "patch_size_level0" not in contents.coords_attributes
        )

    def has_coords(self, contents: FileContents) -> bool:
        """Return whether the file has ``coords`` with the attribute ``patch_level``, and no features."""
        return "features" not in contents.names and "patch_level" in contents.coords_attributes

    def read_features(self, path: Path, slide: SlideInfo | None, encoder: str | None) -> TileFeatures:
        """Read ``h5_files/<id>.h5``, or ``pt_files/<id>.pt`` with the coordinates in the folders next to it."""
        if path.suffix.lower() == ".pt":
            candidates = [path.parent.parent / folder / f"{path.stem}.h5" for folder in ("h5_files", "patches")]
            source = next((file for file in candidates if file.is_file()), None)
            if source is None:
                raise SlideError(
                    f"features in a .pt file need a file of their coordinates, got neither {as_text(candidates[0])} "
                    f"nor {as_text(candidates[1])}; copy CLAM's folder h5_files or patches too"
                )
            return features_of(replace(self.read_coords(source, slide), source=path), read_tensor(path))
        places = self.read_coords(path, slide)
        with opened_h5(path) as file:
            table = file["features"]
            features_TC = h5_tables.rows_of(table, path, None if table.dtype == np.float16 else np.float32)
            header = {
                "encoder": h5_tables.attribute_text(table.attrs, "encoder"),
                "token_mask": token_mask_of(table.attrs),
            }
        return features_of(places, features_TC, **header)

    def read_coords(self, path: Path, slide: SlideInfo | None) -> TileCoords:
        """Read ``patches/<id>.h5``, or the coordinates of a feature file with the geometry from ``patches``."""
        with opened_h5(path) as file:
            coords_T2 = whole_coords(h5_tables.rows_of(file["coords"], path), path)
            header = _header(path, file["coords"].attrs, slide)
        patches = path.parent.parent / "patches" / path.name
        if header is None and patches != path and patches.is_file():
            with opened_h5(patches) as file:
                header = _header(patches, file["coords"].attrs, slide)
        if header is None:
            header = TileHeader(slide_id=path.stem, patch_size_lv0=_smallest_step(coords_T2))
        return TileCoords(**vars(header), coords_T2=coords_T2, layout=self.name, source=path)

    def path_of(self, root: Path, header: TileHeader) -> Path:
        """``pt_files/<id>.pt``, by which CLAM itself knows that a slide is done."""
        return root / "pt_files" / f"{header.slide_id}.pt"

    @contextmanager
    def writing(
        self, root: str | Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32
    ) -> Iterator[TakeTiles]:
        """Write ``patches``, ``h5_files`` and, last, ``pt_files``; features are float32, whatever ``dtype`` says."""

        slide_id, root = writable_id(header), Path(root)
        final = self.path_of(root, header)
        known_fields("clam", header, "patch_size_lv0", "width_px", "height_px")
        paths = [final, root / "h5_files" / f"{slide_id}.h5", root / "patches" / f"{slide_id}.h5"]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            spool = stack.enter_context(TensorSpool(stack.enter_context(replacing(paths[0])), channels, np.float32))
            table_file, patch_file = [stack.enter_context(writing_h5(path)) for path in paths[1:]]
            features = h5_tables.growing_table(table_file, "features", channels, np.float32)
            coords = h5_tables.growing_table(table_file, "coords", 2, np.int32)
            places = h5_tables.growing_table(patch_file, "coords", 2, np.int64)
            _write_geometry(places, header, root)
            features.attrs["encoder"] = header.encoder or "None"
            if header.token_mask is not None:
                features.attrs["token_mask"] = header.token_mask

            def take(features_BC: np.ndarray, coords_B2: np.ndarray, tissue_B: np.ndarray | None = None) -> None:
                features_BC = np.asarray(features_BC, dtype=np.float32)
                coords_B2 = whole_coords(np.asarray(coords_B2), final)
                h5_tables.append_rows(features, features_BC)
                h5_tables.append_rows(coords, coords_B2.astype(np.int32))
                h5_tables.append_rows(places, coords_B2)
                spool.append(features_BC)

            yield take
            spool.save()


def _header(path: Path, attributes: Any, slide: SlideInfo | None) -> TileHeader | None:
    """Return the header that the attributes in ``patches`` state; None if they are missing."""
    side, level = h5_tables.attribute_int(attributes, "patch_size"), h5_tables.attribute_int(attributes, "patch_level")
    if side is None or level is None:
        return None
    downsample = h5_tables.attribute_float(attributes, "downsample")
    if downsample is None and slide is not None and level < len(slide.level_downsamples):
        downsample = slide.level_downsamples[level][0]
    if downsample is None and level == 0:
        downsample = 1.0
    if downsample is None:
        raise SlideError(
            f"coordinates of CLAM must say what their level's downsample is, got patch_level={level} alone in "
            f"{as_text(path)}; name the slide too"
        )
    # Older files state a further downsample of the patch relative to its level.
    downsample *= h5_tables.attribute_float(attributes, "custom_downsample") or 1.0
    spacing_lv0 = slide.spacing_um if slide is not None else h5_tables.attribute_float(attributes, "level0_spacing_um")
    side_lv0 = round(side * downsample)
    spacing_um = h5_tables.attribute_float(attributes, "spacing_um")
    dimensions = np.asarray(attributes.get("level_dim", ())).ravel()
    return TileHeader(
        slide_id=h5_tables.attribute_text(attributes, "name") or path.stem,
        patch_size_px=h5_tables.attribute_int(attributes, "patch_size_px") or side,
        patch_size_lv0=side_lv0,
        spacing_um=spacing_um or (spacing_lv0 and spacing_lv0 * side_lv0 / side),
        overlap_px=h5_tables.attribute_int(attributes, "overlap_px") or 0,
        width_px=int(dimensions[0]) if level == 0 and len(dimensions) == 2 else None,
        height_px=int(dimensions[1]) if level == 0 and len(dimensions) == 2 else None,
        spacing_lv0_um=spacing_lv0,
    )


def _write_geometry(coords: Any, header: TileHeader, root: Path) -> None:
    size = (int(header.width_px or 0), int(header.height_px or 0))
    geometry = {
        "patch_size": header.patch_size_lv0,
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": header.slide_id,
        "save_path": str(root / "patches"),
        "patch_size_px": header.patch_size_px,
        "spacing_um": header.spacing_um,
        "overlap_px": header.overlap_px or None,
        "level0_spacing_um": header.spacing_lv0_um,
    }
    for name, value in geometry.items():
        if value is not None:
            coords.attrs[name] = value


def _smallest_step(coords_T2: np.ndarray) -> int | None:
    """Return the smallest step between tiles along either axis; None if there is only one tile."""
    steps = np.concatenate([np.diff(np.unique(coords_T2[:, axis])) for axis in (0, 1)])
    return int(steps.min()) if len(steps) else None

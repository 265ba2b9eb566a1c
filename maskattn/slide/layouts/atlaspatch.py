"""AtlasPatch's layout, which is read and not written.

``ROOT/patches/<stem>.h5`` has ``coords`` (T, 5) int32: x and y in level-0 pixels, the width and height that are read
and the level they are read from; the group ``features`` has a dataset (T, C) float32 for each encoder. The geometry
is in the file's attributes: ``patch_size, patch_size_level0, level0_magnification, target_magnification, overlap,
level0_width, level0_height, wsi_path, filename`` and, if the slide states it, ``mpp``. Source: version 1.0.0.post5
(AtlasAnalyticsLab/AtlasPatch, commit 31146af: ``atlas_patch/services/storage.py``, ``extraction.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.layouts.checks import features_of, whole_coords
from maskattn.slide.layouts.contents import FileContents, opened_h5
from maskattn.slide.layouts.h5_tables import attribute_float, attribute_int, attribute_text, rows_of
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures
from maskattn.slide.names import as_text

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["AtlasPatch"]

_COLUMNS = 5


class AtlasPatch:
    """AtlasPatch: coordinates with their level, and features of any number of encoders, in one file."""

    name = "atlaspatch"
    feature_patterns = ("patches/{id}.h5", "{id}.h5")
    coords_patterns = ("patches/{id}.h5", "{id}.h5")

    def has_features(self, contents: FileContents) -> bool:
        """Return whether the file has ``coords`` of five columns and the group ``features``."""
        return contents.coords_columns == _COLUMNS and "features" in contents.groups

    def has_coords(self, contents: FileContents) -> bool:
        """Return whether the file has ``coords`` of five columns and no features."""
        return contents.coords_columns == _COLUMNS and "features" not in contents.names

    def read_features(self, path: Path, slide: SlideInfo | None, encoder: str | None) -> TileFeatures:
        """Read the features of one encoder, which must be named if the file has several."""
        places = self.read_coords(path, slide)
        with opened_h5(path) as file:
            encoders = sorted(name for name in file["features"] if not name.startswith("__tmp_"))
            wanted = [name for name in encoders if encoder is None or name.lower() == encoder.lower()]
            if len(wanted) != 1:
                raise SlideError(
                    f"a feature file must hold the features of the encoder {encoder or 'that is asked for'}, got those "
                    f"of {', '.join(encoders) or 'none'} in {as_text(path)}; name one of them"
                )
            features_TC = rows_of(file["features"][wanted[0]], path, np.float32)
        return features_of(places, features_TC, encoder=wanted[0])

    def read_coords(self, path: Path, slide: SlideInfo | None) -> TileCoords:
        """Read the coordinates."""
        with opened_h5(path) as file:
            attributes = file.attrs
            coords_T2 = whole_coords(rows_of(file["coords"], path)[:, :2], path)
            target = attribute_float(attributes, "target_magnification")
            side_px = attribute_int(attributes, "patch_size")
            side_lv0 = attribute_int(attributes, "patch_size_level0")
            spacing_lv0 = slide.spacing_um if slide is not None else attribute_float(attributes, "mpp")
            wsi_path = attribute_text(attributes, "wsi_path")
            return TileCoords(
                slide_id=path.stem,
                patch_size_px=side_px,
                patch_size_lv0=side_lv0,
                spacing_um=10 / target if target else None,
                overlap_px=attribute_int(attributes, "overlap") or 0,
                width_px=attribute_int(attributes, "level0_width"),
                height_px=attribute_int(attributes, "level0_height"),
                spacing_lv0_um=spacing_lv0,
                magnification=attribute_float(attributes, "level0_magnification") or None,
                slide_path=Path(wsi_path) if wsi_path else None,
                coords_T2=coords_T2,
                layout=self.name,
                source=path,
            )

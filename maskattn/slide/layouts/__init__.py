"""Layouts of tile features and coordinates: those of TRIDENT, CLAM, STAMP, slide2vec, hs2p and AtlasPatch.

Nothing here imports torch until a ``.pt`` file is read or written.
"""

from maskattn.slide.layouts.feature_files import (
    FEATURE_LAYOUTS,
    FEATURE_READERS,
    detect_layout,
    find_coords,
    find_features,
    list_features,
    read_coords,
    read_features,
    write_features,
)
from maskattn.slide.layouts.lattice import grid_cells
from maskattn.slide.layouts.layout import FeatureLayout, FeatureReader, TakeTiles
from maskattn.slide.layouts.reading_order import in_reading_order
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures, TileHeader, TokenMask

__all__ = [
    "FEATURE_LAYOUTS",
    "FEATURE_READERS",
    "FeatureLayout",
    "FeatureReader",
    "TakeTiles",
    "TileCoords",
    "TileFeatures",
    "TileHeader",
    "TokenMask",
    "detect_layout",
    "find_coords",
    "find_features",
    "grid_cells",
    "in_reading_order",
    "list_features",
    "read_coords",
    "read_features",
    "write_features",
]

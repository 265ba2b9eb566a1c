"""hs2p's files of coordinates, which slide2vec and soma read.

``tiles/<id>.coordinates.npz`` has ``tile_index`` int32, ``x`` and ``y`` int64 in level-0 pixels and
``tissue_fractions`` float32; ``tiles/<id>.coordinates.meta.json`` beside it has the sections ``provenance, slide,
tiling, segmentation, filtering, artifact`` with exactly the keys below: hs2p refuses a file with others. Tiles are in
the order of x, then y. As in version 4.4.1 (clemsgrs/hs2p, commit 8520c06: ``hs2p/tiling/io.py``,
``docs/artifacts.md``).

What hs2p records of how it found tissue has no counterpart here and is null. Where a tile's fraction of tissue is not
known it is NaN.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.layouts.checks import whole_coords
from maskattn.slide.layouts.contents import FileContents, reading
from maskattn.slide.layouts.layout import known_fields
from maskattn.slide.layouts.tile_features import TileCoords, TileHeader
from maskattn.slide.names import as_text

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["META_ENDING", "NPZ_ENDING", "header_of_meta", "is_hs2p", "read_hs2p_coords", "tiling_metadata", "write_npz"]

NPZ_ENDING, META_ENDING = ".coordinates.npz", ".coordinates.meta.json"
_SEGMENTATION = (
    *("tissue_method", "requested_seg_downsample", "seg_downsample", "seg_level", "seg_spacing_um", "sthresh"),
    *("sthresh_up", "mthresh", "close", "sam2_checkpoint_path", "sam2_config_path", "mask_path", "ref_tile_size_px"),
    *("tissue_mask_tissue_value", "mask_level", "mask_spacing_um"),
)
_FILTERING = (
    *("a_t", "a_h", "filter_white", "filter_black", "white_threshold", "black_threshold", "fraction_threshold"),
    *("filter_grayspace", "grayspace_saturation_threshold", "grayspace_fraction_threshold", "filter_blur"),
    *("blur_threshold", "qc_spacing_um"),
)


def is_hs2p(contents: FileContents) -> bool:
    """Whether an archive holds hs2p's coordinates."""
    return contents.kind == "npz" and {"tile_index", "x", "y"} <= contents.names


def read_hs2p_coords(path: Path, slide: SlideInfo | None) -> TileCoords:
    """Read coordinates with the ``.meta.json`` beside them.

    Raises:
        SlideError: either cannot be used.
    """
    slide_id = path.name.removesuffix(NPZ_ENDING).removesuffix(".npz")
    with reading(path), np.load(path, allow_pickle=False) as archive:
        x, y = archive["x"], archive["y"]
        if x.shape != y.shape or x.ndim != 1:
            raise SlideError(
                f"hs2p's coordinates must have an x and a y for each tile, got x.shape={x.shape} and "
                f"y.shape={y.shape} in {as_text(path)}; tile the slide again"
            )
        coords_T2 = whole_coords(np.stack((x, y), axis=1), path)
    header = header_of_meta(path.with_name(slide_id + META_ENDING))
    if header.slide_id != slide_id:
        raise SlideError(
            f"hs2p's coordinates must have the .meta.json of their slide, got one of {header.slide_id!r} beside "
            f"{as_text(path)}; copy the one of {slide_id!r}"
        )
    return TileCoords(**vars(header), coords_T2=coords_T2, layout="hs2p", source=path)


def header_of_meta(path: Path) -> TileHeader:
    """What a ``.coordinates.meta.json`` says of the tiles.

    Raises:
        SlideError: it cannot be used.
    """
    with reading(path):
        meta = json.loads(path.read_text(encoding="utf-8"))
        provenance, slide, tiling = meta["provenance"], meta["slide"], meta["tiling"]
        width, height = slide["dimensions"]
        side_px = int(tiling["requested_tile_size_px"])
        return TileHeader(
            slide_id=str(provenance["sample_id"]),
            patch_size_px=side_px,
            patch_size_lv0=int(tiling["tile_size_lv0"]),
            spacing_um=float(tiling["requested_spacing_um"]),
            overlap_px=round(float(tiling.get("overlap") or 0) * side_px),
            width_px=int(width),
            height_px=int(height),
            spacing_lv0_um=slide["base_spacing_um"] and float(slide["base_spacing_um"]),
            slide_path=Path(provenance["image_path"]) if provenance.get("image_path") else None,
        )


def write_npz(path: Path, coords_T2: np.ndarray, fractions_T: np.ndarray) -> None:
    """Write the coordinates, which are in the order of x, then y.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            tile_index=np.arange(len(coords_T2), dtype=np.int32),
            x=coords_T2[:, 0].astype(np.int64),
            y=coords_T2[:, 1].astype(np.int64),
            tissue_fractions=fractions_T.astype(np.float32),
        )


def tiling_metadata(header: TileHeader, tiles: int) -> dict[str, Any]:
    """The ``.coordinates.meta.json`` of a slide's tiles.

    Raises:
        ValueError: the header lacks what hs2p must have.
    """
    side_px, side_lv0, spacing_um, spacing_lv0, width, height = known_fields(
        *("slide2vec", header, "patch_size_px", "patch_size_lv0", "spacing_um", "spacing_lv0_um"),
        *("width_px", "height_px"),
    )
    return {
        "provenance": {
            "sample_id": header.slide_id,
            "image_path": str(header.slide_path or ""),
            "mask_path": None,
            "backend": "maskattn",
            "requested_backend": "maskattn",
            "spacing_at_level_0": None,
            "mask_backend": None,
            "requested_mask_backend": None,
        },
        "slide": {
            "dimensions": [int(width), int(height)],
            "base_spacing_um": spacing_lv0,
            "level_downsamples": [1.0],
        },
        "tiling": {
            "requested_tile_size_px": side_px,
            "requested_spacing_um": spacing_um,
            "read_level": 0,
            "read_tile_size_px": side_lv0,
            "read_spacing_um": spacing_lv0,
            "tile_size_lv0": side_lv0,
            "tolerance": 0.0,
            "step_px_lv0": int(side_lv0) - (header.overlap_lv0 or 0),
            "overlap": header.overlap_px / side_px,
            "min_tissue_fraction": 0.0,
            "is_within_tolerance": False,
            "n_tiles": tiles,
        },
        "segmentation": dict.fromkeys(_SEGMENTATION),
        "filtering": dict.fromkeys(_FILTERING),
        "artifact": {
            "coordinate_space": "level0_px",
            "tile_order": "x_then_y",
            "annotation": None,
            "selection_strategy": None,
            "output_mode": None,
        },
    }

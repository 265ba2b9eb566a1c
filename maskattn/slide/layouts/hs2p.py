"""hs2p's files of coordinates, which slide2vec and soma read.

``tiles/<id>.coordinates.npz`` has ``tile_index`` int32, ``x`` and ``y`` int64 in level-0 pixels and
``tissue_fractions`` float32; ``tiles/<id>.coordinates.meta.json`` next to it has the sections ``provenance, slide,
tiling, segmentation, filtering, artifact`` with exactly the keys below: hs2p refuses a file with others. Tiles are
sorted by x, then y. Source: version 4.4.1 (clemsgrs/hs2p, commit 8520c06: ``hs2p/tiling/io.py``,
``docs/artifacts.md``).

The settings of hs2p's tissue segmentation have no counterpart here and are null. An unknown fraction of tissue is NaN.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.files import replacing
from maskattn.slide.layouts.checks import whole_coords
from maskattn.slide.layouts.contents import FileContents, reading
from maskattn.slide.layouts.layout import known_fields
from maskattn.slide.layouts.tile_features import TileCoords, TileHeader
from maskattn.slide.names import as_text

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["META_ENDING", "NPZ_ENDING", "WritingTiles", "header_of_meta", "is_hs2p", "read_hs2p_coords", "write_json"]

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
    """Return whether a file is an archive of hs2p's coordinates."""
    return contents.kind == "npz" and {"tile_index", "x", "y"} <= contents.names


def read_hs2p_coords(path: Path, slide: SlideInfo | None) -> TileCoords:
    """Read coordinates and the ``.meta.json`` next to them.

    Raises:
        SlideError: either file cannot be used.
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
            f"hs2p's coordinates must have the .meta.json of their slide, got one of {header.slide_id!r} next to "
            f"{as_text(path)}; copy the one of {slide_id!r}"
        )
    return TileCoords(**vars(header), coords_T2=coords_T2, layout="hs2p", source=path)


def header_of_meta(path: Path) -> TileHeader:
    """Read the header of tiles from a ``.coordinates.meta.json``.

    Raises:
        SlideError: the file cannot be used.
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


class WritingTiles:
    """A context manager that writes hs2p's two files from batches of tiles in any order.

    The files appear when the context ends, the coordinates first. Without tiles there is no file of coordinates.

    Args:
        root: the folder below which ``tiles`` is made.
        header: the metadata of all tiles.

    Raises:
        ValueError: the header lacks a field that hs2p requires.
    """

    def __init__(self, root: str | Path, header: TileHeader) -> None:
        _metadata_of_tiles(header, 0)
        self.path = Path(root) / "tiles" / f"{header.slide_id}{NPZ_ENDING}"
        self._header = header
        self._coords: list[np.ndarray] = [np.empty((0, 2), np.int64)]
        self._fractions: list[np.ndarray] = [np.empty(0, np.float32)]
        self._files = ExitStack()

    @property
    def taken(self) -> int:
        """The number of tiles appended so far."""
        return sum(map(len, self._coords))

    def __enter__(self) -> WritingTiles:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._meta = self._files.enter_context(replacing(self.path.with_name(self._header.slide_id + META_ENDING)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def append(self, coords_B2: np.ndarray, tissue_B: np.ndarray | None) -> None:
        """Append tiles: (B, 2) coordinates in level-0 pixels and, if known, (B,) fractions of tissue."""
        self._coords.append(whole_coords(np.asarray(coords_B2), self.path))
        self._fractions.append(np.full(len(coords_B2), np.nan) if tissue_B is None else np.asarray(tissue_B))

    def save(self) -> np.ndarray:
        """Write both files; return the indices (T,) that sort the tiles in hs2p's order, by x, then y."""
        coords_T2 = np.concatenate(self._coords)
        order = np.lexsort((coords_T2[:, 1], coords_T2[:, 0]))
        write_json(self._meta, _metadata_of_tiles(self._header, len(order)))
        if len(order):
            npz = self._files.enter_context(replacing(self.path))
            _write_npz(npz, coords_T2[order], np.concatenate(self._fractions)[order])
        else:
            self.path.unlink(missing_ok=True)
        return order


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a ``.meta.json`` in the format of hs2p and slide2vec."""
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_npz(path: Path, coords_T2: np.ndarray, fractions_T: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            tile_index=np.arange(len(coords_T2), dtype=np.int32),
            x=coords_T2[:, 0].astype(np.int64),
            y=coords_T2[:, 1].astype(np.int64),
            tissue_fractions=fractions_T.astype(np.float32),
        )


def _metadata_of_tiles(header: TileHeader, tiles: int) -> dict[str, Any]:
    """Return the contents of ``.coordinates.meta.json``; raise ValueError if the header lacks a required field."""
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

"""slide2vec's ``hierarchical_embeddings``: features of patches grouped by region, as HIPT's upper levels read them.

``ROOT/hierarchical_embeddings/<id>.pt`` is one tensor (T, n·n, C), patches row-major in their region, next to
``<id>.meta.json``; ``ROOT/tiles/<id>.coordinates.npz`` and ``.meta.json`` are hs2p's coordinates of the regions, in the
order of the tensor: by x, then y. Source: version 5.7.0 (clemsgrs/slide2vec: ``slide2vec/artifacts.py``,
``slide2vec/runtime/embedding.py``, ``docs/hierarchical.rst``).

A patch that was left out because it shows no tissue is a row of zeros, which no encoder returns.

Dimension key: T regions, N = n·n patches of a region, C channels, B regions of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.files import replacing
from maskattn.shapes import Bool, Float
from maskattn.slide.layouts import hs2p
from maskattn.slide.layouts.checks import check_inside, check_same_slide, checked_features
from maskattn.slide.layouts.hs2p import META_ENDING, NPZ_ENDING
from maskattn.slide.layouts.layout import TakeTiles, known_fields, writable_id
from maskattn.slide.layouts.slide2vec import meta_of, read_meta
from maskattn.slide.layouts.tensor_files import TensorSpool, read_tensor
from maskattn.slide.layouts.tile_features import TileCoords, TileHeader
from maskattn.slide.layouts.trident import token_mask_of
from maskattn.slide.names import as_text

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = [
    "RegionFeatures",
    "RegionLayout",
    "TakeRegions",
    "find_regions",
    "list_regions",
    "read_regions",
    "regions_path",
    "writing_regions",
]

_FOLDER = "hierarchical_embeddings"

TakeRegions = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], None]
"""Takes features (B, N, C), coordinates (B, 2) in level-0 pixels and the regions' fractions of tissue (B,) or None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RegionFeatures(TileCoords):
    """Features of the patches of a slide's regions; the header and the coordinates are those of the regions.

    Attributes:
        features_TNC: (T, N, C) float32 or float16, finite.
        keep_TN: (T, N) bool, True for patches that have features.
    """

    features_TNC: Float[np.ndarray, "T N C"]
    keep_TN: Bool[np.ndarray, "T N"]


def regions_path(root: str | Path, slide_id: str) -> Path:
    """Return the path of a slide's features of regions below a folder."""
    return Path(root) / _FOLDER / f"{slide_id}.pt"


def find_regions(root: str | Path, slide_id: str) -> Path | None:
    """Find a slide's features of regions below or in a folder; None if there are none."""
    return list_regions(root).get(slide_id)


def list_regions(root: str | Path) -> dict[str, Path]:
    """List the files of regions below or in a folder, by the ids of their slides."""
    root = Path(root)
    folder = root if root.name == _FOLDER else root / _FOLDER
    return {path.stem: path for path in sorted(folder.glob("*.pt"))}


@contextmanager
def writing_regions(
    root: str | Path, header: TileHeader, patches: int, channels: int, dtype: np.dtype | type = np.float32
) -> Iterator[TakeRegions]:
    """Write features region by region; the context yields a function that takes a batch of regions.

    Args:
        root: the folder below which slide2vec's folders are made.
        header: the metadata of all regions; ``patch_size_px`` and ``patch_size_lv0`` are the sides of a region.
        patches: N, a square number.
        channels: C.
        dtype: float32 or float16.

    Raises:
        ValueError: N is not a square number, or the header lacks a field that hs2p requires.
        OSError: a file cannot be written.
    """
    side = math.isqrt(patches)
    if side * side != patches or side < 2:
        raise ValueError(f"a region must have 2 × 2 patches or more in a square, got {patches}; choose another region")
    final = regions_path(root, writable_id(header))
    tiles = hs2p.WritingTiles(root, header)
    final.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pt, meta = (stack.enter_context(replacing(path)) for path in (final, meta_of(final)))
        stack.enter_context(tiles)
        spool = stack.enter_context(TensorSpool(pt, patches * channels, dtype))

        def take(features_BNC: np.ndarray, coords_B2: np.ndarray, tissue_B: np.ndarray | None = None) -> None:
            if features_BNC.shape[1:] != (patches, channels):
                raise ValueError(
                    f"features of regions must be (B, {patches}, {channels}), got {features_BNC.shape}; give a row for "
                    "each patch, of zeros where it was left out"
                )
            spool.append(features_BNC.reshape(len(features_BNC), -1))
            tiles.append(coords_B2, tissue_B)

        yield take
        order = tiles.save()
        spool.save(order, (len(order), patches, channels))
        hs2p.write_json(meta, _metadata(header, side, channels, len(order), spool.dtype, tiles.path))


@dataclass(frozen=True)
class RegionLayout:
    """A layout, like those of :data:`maskattn.slide.layouts.FEATURE_LAYOUTS`, that writes tiles as patches of regions.

    Tiles must come region by region, in batches of any size; missing tiles become rows of zeros.

    Attributes:
        side: the number of patches along a side of a region.
    """

    side: int

    def region_lv0(self, header: TileHeader) -> int:
        """Return the side of a region in level-0 pixels, given the header of its patches."""
        patch_px, spacing_um, spacing_lv0 = known_fields(
            "slide2vec", header, "patch_size_px", "spacing_um", "spacing_lv0_um"
        )
        return round(self.side * patch_px * spacing_um / spacing_lv0)

    def path_of(self, root: Path, header: TileHeader) -> Path:
        """Return the path ``hierarchical_embeddings/<id>.pt`` below ``root``."""
        return regions_path(root, header.slide_id)

    @contextmanager
    def writing(
        self, root: str | Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32
    ) -> Iterator[TakeTiles]:
        """Write a slide's features; the context yields a function that takes a batch of tiles."""
        region_lv0, N = self.region_lv0(header), self.side**2
        of_regions = replace(header, patch_size_px=(header.patch_size_px or 0) * self.side, patch_size_lv0=region_lv0)
        with writing_regions(root, of_regions, N, channels, dtype) as take_regions:
            region = _Region(take_regions, N, channels, np.dtype(dtype))

            def take(features_BC: np.ndarray, coords_B2: np.ndarray, tissue_B: np.ndarray | None = None) -> None:
                corners_B2 = coords_B2 // region_lv0
                cells_B2 = np.rint((coords_B2 - corners_B2 * region_lv0) * (self.side / region_lv0)).astype(int)
                for row, corner in enumerate(corners_B2 * region_lv0):
                    share = None if tissue_B is None else float(tissue_B[row])
                    region.put(corner, cells_B2[row, 1] * self.side + cells_B2[row, 0], features_BC[row], share)

            yield take
            region.close()


class _Region:
    """A buffer for the patches of one region, which passes it on when a patch of another region comes."""

    def __init__(self, take: TakeRegions, patches: int, channels: int, dtype: np.dtype) -> None:
        self._take, self._features_NC = take, np.zeros((patches, channels), dtype)
        self._corner: np.ndarray | None = None
        self._tissue: float | None = 0.0

    def put(self, corner: np.ndarray, patch: int, features_C: np.ndarray, tissue: float | None) -> None:
        """Store one patch."""
        if self._corner is None or (corner != self._corner).any():
            self.close()
            self._corner, self._tissue = corner, 0.0
        self._features_NC[patch] = features_C
        self._tissue = None if tissue is None or self._tissue is None else self._tissue + tissue

    def close(self) -> None:
        """Pass the buffered region on."""
        if self._corner is not None:
            tissue = None if self._tissue is None else np.array([self._tissue / len(self._features_NC)])
            self._take(self._features_NC[None], self._corner[None], tissue)
        self._features_NC[:] = 0


def read_regions(path: str | Path, *, slide: SlideInfo | None = None, named: Sequence[str] = ()) -> RegionFeatures:
    """Read ``hierarchical_embeddings/<id>.pt`` with its coordinates.

    Args:
        path: the file of the tensor.
        slide: the slide of the features, which must agree with the files' metadata.
        named: accepted names of the slide; files that state another are refused.

    Raises:
        SlideError: a file cannot be used, belongs to another slide, or the numbers of regions differ.
    """
    path = Path(path)
    if not path.is_file():
        raise SlideError(f"features of regions must exist, got no file {as_text(path)}; extract the slide first")
    held = read_tensor(path)
    side = math.isqrt(held.shape[1]) if held.ndim == 3 else 0
    if held.ndim != 3 or side * side != held.shape[1]:
        raise SlideError(
            f"features of regions must be (regions, n·n patches, channels), got {held.shape} in {as_text(path)}; those "
            "of tiles are in tile_embeddings"
        )
    meta = read_meta(path)
    places = replace(
        hs2p.read_hs2p_coords(path.parent.parent / "tiles" / f"{path.stem}{NPZ_ENDING}", slide),
        layout="slide2vec",
        source=path,
        encoder=meta.get("encoder_name") or None,
        token_mask=token_mask_of(meta),
    )
    T, N, C = held.shape
    if len(places.coords_T2) != T:
        raise SlideError(
            f"features of regions must have coordinates of each region, got {T} regions and {len(places.coords_T2)} "
            f"coordinates for {as_text(path)}; extract the slide again"
        )
    features_TNC = checked_features(held.reshape(T, N * C), T, path).reshape(T, N, C)
    check_same_slide(places, tuple(named), None if slide is None else (slide.width_px, slide.height_px))
    check_inside(places)
    keep_TN = np.stack([region.any(axis=1) for region in features_TNC]) if T else np.empty((0, N), bool)
    return RegionFeatures(**vars(places), features_TNC=features_TNC, keep_TN=keep_TN)


def _metadata(header: TileHeader, side: int, channels: int, regions: int, dtype: np.dtype, npz: Path) -> dict[str, Any]:
    region_px, region_lv0 = int(header.patch_size_px or 0), int(header.patch_size_lv0 or 0)
    return {
        "sample_id": header.slide_id,
        "artifact_type": "hierarchical_embeddings",
        "format": "pt",
        "feature_dim": channels,
        "num_regions": regions,
        "tiles_per_region": side * side,
        "encoder_name": header.encoder or "unknown",
        "encoder_level": "tile",
        "coordinates_npz_path": str(npz) if regions else "",
        "coordinates_meta_path": str(npz.with_name(header.slide_id + META_ENDING)),
        "image_path": str(header.slide_path or ""),
        "mask_path": None,
        "backend": "maskattn",
        "region_tile_multiple": side,
        "requested_tile_size_px": region_px // side,
        "read_tile_size_px": round(region_lv0 / side),
        "requested_region_size_px": region_px,
        "read_region_size_px": region_lv0,
        "requested_spacing_um": header.spacing_um,
        "encoder_input_size_px": region_px // side if regions else None,
        "subtile_order": "row_major",
        "feature_dtype": "fp16" if dtype == np.float16 else "fp32",
        "token_mask": header.token_mask,
    }

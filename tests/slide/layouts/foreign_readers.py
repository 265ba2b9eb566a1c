"""Readers of tile features as those projects describe their own files; nothing of ours is called here.

Each gives (features, level-0 x and y, side of a tile in level-0 pixels, the slide's id), after it has made sure of the
names, dtypes and attributes that its project's own code relies on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch


class Read(NamedTuple):
    features: np.ndarray
    xy: np.ndarray
    side_lv0: int
    name: str


def read_as_trident_does(job_dir: Path, name: str, encoder: str, mag: int, patch_size: int, overlap: int) -> Read:
    coords_dir = job_dir / f"{float(mag):g}x_{patch_size}px_{overlap}px_overlap"
    with h5py.File(coords_dir / "patches" / f"{name}_patches.h5", "r") as f:
        attrs, coords = dict(f["coords"].attrs), f["coords"][:]
    assert coords.dtype == np.int64
    assert set(attrs) >= {
        *("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "name"),
        *("savetodir", "level0_width", "level0_height"),
    }
    assert (attrs["patch_size"], attrs["overlap"], attrs["name"]) == (patch_size, overlap, name)
    assert attrs["savetodir"] == str(coords_dir)
    # WSIPatcher: µm of a pixel are 10 / magnification, and a tile is read at round(patch_size · downsample).
    downsample = (10 / attrs["target_magnification"]) / (10 / attrs["level0_magnification"])
    side_lv0 = round(patch_size * downsample)
    assert side_lv0 == attrs["patch_size_level0"]
    with h5py.File(coords_dir / f"features_{encoder}" / f"{name}.h5", "r") as f:
        assert f["features"].attrs["name"] == name
        assert f["features"].attrs["encoder"] == encoder
        assert f["features"].attrs["savetodir"] == str(coords_dir / f"features_{encoder}")
        assert dict(f["coords"].attrs) == attrs
        np.testing.assert_array_equal(f["coords"][:], coords)
        return Read(f["features"][:], coords, side_lv0, name)


def read_as_clam_does(feat_dir: Path, slide_id: str, level_downsamples: tuple[float, ...] = (1.0,)) -> Read:
    with h5py.File(feat_dir / "patches" / f"{slide_id}.h5", "r") as f:  # Whole_Slide_Bag_FP, StitchCoords
        attrs = dict(f["coords"].attrs)
        stored = f["coords"][:]
        assert f["coords"].dtype == np.int64
    assert set(attrs) >= {
        *("patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim", "name", "save_path"),
    }
    assert len(attrs["downsample"]) == len(attrs["level_dim"]) == len(attrs["downsampled_level_dim"]) == 2
    side_lv0 = int(attrs["patch_size"] * level_downsamples[attrs["patch_level"]])
    with h5py.File(feat_dir / "h5_files" / f"{slide_id}.h5", "r") as f:  # Generic_MIL_Dataset with use_h5
        features, coords = f["features"][:], f["coords"][:]
    assert (features.dtype, coords.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(coords, stored)
    bag = torch.load(feat_dir / "pt_files" / f"{slide_id}.pt", weights_only=True)  # Generic_MIL_Dataset
    assert (bag.dtype, bag.is_contiguous()) == (torch.float32, True)
    np.testing.assert_array_equal(bag.numpy(), features)
    return Read(features, coords.astype(np.int64), side_lv0, str(attrs["name"]))


def read_as_stamp_does(feature_dir: Path, filename: str, slide_mpp: float, installed: tuple[int, ...]) -> Read:
    with h5py.File(feature_dir / filename, "r") as h5:  # BagDataset, get_coords
        feats, coords_um = h5["feats"][()], h5["coords"][:]
        attrs = dict(h5.attrs)
    assert (feats.dtype, coords_um.dtype) == (np.float16, np.float32)
    assert {"stamp_version", "extractor", "unit", "tile_size_um", "tile_size_px", "code_hash", "feat_type"} <= set(
        attrs
    )
    assert (attrs["unit"], attrs["feat_type"]) == ("um", "tile")
    assert tuple(int(part) for part in attrs["stamp_version"].split(".")) <= installed
    side_lv0 = round(float(attrs["tile_size_um"]) / slide_mpp)
    return Read(feats, np.round(coords_um / slide_mpp).astype(np.int64), side_lv0, Path(filename).stem)


HS2P_KEYS = {
    "provenance": "sample_id image_path mask_path backend requested_backend spacing_at_level_0 mask_backend "
    "requested_mask_backend",
    "slide": "dimensions base_spacing_um level_downsamples",
    "tiling": "requested_tile_size_px requested_spacing_um read_level read_tile_size_px read_spacing_um tile_size_lv0 "
    "tolerance step_px_lv0 overlap min_tissue_fraction is_within_tolerance n_tiles",
    "segmentation": "tissue_method requested_seg_downsample seg_downsample seg_level seg_spacing_um sthresh sthresh_up "
    "mthresh close sam2_checkpoint_path sam2_config_path mask_path ref_tile_size_px tissue_mask_tissue_value "
    "mask_level mask_spacing_um",
    "filtering": "a_t a_h filter_white filter_black white_threshold black_threshold fraction_threshold "
    "filter_grayspace grayspace_saturation_threshold grayspace_fraction_threshold filter_blur blur_threshold "
    "qc_spacing_um",
    "artifact": "coordinate_space tile_order annotation selection_strategy output_mode",
}


def read_as_slide2vec_does(output_dir: Path, sample_id: str) -> Read:
    features = torch.load(output_dir / "tile_embeddings" / f"{sample_id}.pt", map_location="cpu", weights_only=True)
    meta = json.loads((output_dir / "tile_embeddings" / f"{sample_id}.meta.json").read_text(encoding="utf-8"))
    assert meta["artifact_type"] == "tile_embeddings"
    assert (meta["sample_id"], meta["format"]) == (sample_id, "pt")
    assert (meta["num_tiles"], meta["feature_dim"]) == tuple(features.shape)
    assert {"fp32": torch.float32, "fp16": torch.float16}[meta["feature_dtype"]] == features.dtype
    tiling = json.loads((output_dir / "tiles" / f"{sample_id}.coordinates.meta.json").read_text())
    # hs2p takes exactly these keys.
    assert {section: set(keys) for section, keys in tiling.items()} == {
        section: set(keys.split()) for section, keys in HS2P_KEYS.items()
    }
    assert tiling["artifact"]["coordinate_space"] == "level0_px"
    assert tiling["tiling"]["n_tiles"] == len(features)
    with np.load(output_dir / "tiles" / f"{sample_id}.coordinates.npz", allow_pickle=False) as npz:
        assert {name: npz[name].dtype for name in npz.files} == {
            "tile_index": np.int32,
            "x": np.int64,
            "y": np.int64,
            "tissue_fractions": np.float32,
        }
        np.testing.assert_array_equal(npz["tile_index"], np.arange(len(features)))
        xy = np.stack((npz["x"], npz["y"]), axis=1)
    np.testing.assert_array_equal(np.lexsort((xy[:, 1], xy[:, 0])), np.arange(len(xy)))
    return Read(features.numpy(), xy, tiling["tiling"]["tile_size_lv0"], tiling["provenance"]["sample_id"])

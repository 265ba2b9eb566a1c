"""Files of tile features and coordinates as those projects' own code writes them; nothing of ours is called here."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import torch


def save_h5(path: Path, assets: dict[str, np.ndarray], attributes: dict[str, dict[str, object]] | None = None) -> Path:
    """Save arrays as TRIDENT and CLAM do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in assets.items():
            data = file.create_dataset(
                key, value.shape, value.dtype, maxshape=(None, *value.shape[1:]), chunks=(1, *value.shape[1:])
            )
            data[:] = value
            for name, attribute in (attributes or {}).get(key, {}).items():
                data.attrs[name] = attribute
    return path


def trident_coords(side_lv0: int = 512, size: tuple[int, int] = (20_000, 10_000)) -> dict[str, object]:
    return {
        "patch_size": 256,
        "patch_size_level0": side_lv0,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "slide-1",
        "savetodir": "job/20x_256px_0px_overlap",
        "level0_width": size[0],
        "level0_height": size[1],
    }


def write_as_trident(job: Path, features: np.ndarray, coords: np.ndarray, **changed: object) -> tuple[Path, Path]:
    """The feature file and that of the coordinates."""
    attributes = {**trident_coords(), **changed}
    name = str(attributes["name"])
    folder = job / "20x_256px_0px_overlap"
    told = {"name": name, "savetodir": str(folder / "features_uni_v1"), "encoder": "uni_v1"}
    coords_file = save_h5(folder / "patches" / f"{name}_patches.h5", {"coords": coords}, {"coords": attributes})
    both = {"features": features, "coords": coords}
    path = save_h5(folder / "features_uni_v1" / f"{name}.h5", both, {"features": told, "coords": attributes})
    return path, coords_file


def write_as_clam(
    root: Path, features: np.ndarray, coords: np.ndarray, level: int = 1, downsample: float = 4.0
) -> tuple[Path, Path, Path]:
    """The feature file, the tensor and the file of the coordinates, cut out of level ``level``."""
    size = (20_000 // int(downsample), 10_000 // int(downsample))
    attributes = {
        "patch_size": 256,
        "patch_level": level,
        "downsample": (downsample, downsample),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": "slide-1",
        "save_path": str(root / "patches"),
    }
    coords_file = save_h5(root / "patches" / "slide-1.h5", {"coords": coords}, {"coords": attributes})
    both = {"features": features.astype(np.float32), "coords": coords.astype(np.int32)}
    path = save_h5(root / "h5_files" / "slide-1.h5", both)
    (root / "pt_files").mkdir()
    torch.save(torch.from_numpy(both["features"]), root / "pt_files" / "slide-1.pt")
    return path, root / "pt_files" / "slide-1.pt", coords_file


def write_as_stamp(path: Path, features: np.ndarray, coords_um: np.ndarray, **attributes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"], file["feats"] = coords_um.astype(np.float32), features.astype(np.float16)
        file.attrs.update(attributes)
    return path


COORDS = np.array([[0, 0], [512, 0], [0, 512], [1024, 1536]], np.int64)
FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3) / 8

STAMP_ATTRIBUTES = {
    "stamp_version": "2.5.0",
    "extractor": "uni2",
    "unit": "um",
    "tile_size_um": 256.0,
    "tile_size_px": 224,
    "code_hash": "0123abcd",
    "feat_type": "tile",
}


def write_as_slide2vec(root: Path, features: torch.Tensor, coords: np.ndarray, overlap: float = 0.0) -> Path:
    embeddings, tiles = root / "tile_embeddings", root / "tiles"
    embeddings.mkdir(parents=True)
    tiles.mkdir()
    torch.save(features, embeddings / "slide-1.pt")
    meta = {
        "sample_id": "slide-1",
        "artifact_type": "tile_embeddings",
        "encoder_name": "virchow2",
        "num_tiles": len(features),
        "feature_dim": features.shape[-1],
        "coordinates_npz_path": "",
    }
    (embeddings / "slide-1.meta.json").write_text(json.dumps(meta))
    np.savez_compressed(
        tiles / "slide-1.coordinates.npz",
        tile_index=np.arange(len(coords), dtype=np.int32),
        x=coords[:, 0].astype(np.int64),
        y=coords[:, 1].astype(np.int64),
        tissue_fractions=np.full(len(coords), 0.5, np.float32),
    )
    tiling = {
        "provenance": {"sample_id": "slide-1", "image_path": "/data/slide-1.svs"},
        "slide": {"dimensions": [20_000, 10_000], "base_spacing_um": 0.25, "level_downsamples": [1.0, 4.0]},
        "tiling": {
            "requested_tile_size_px": 256,
            "requested_spacing_um": 0.5,
            "tile_size_lv0": 512,
            "overlap": overlap,
            "n_tiles": len(coords),
        },
        "segmentation": {},
        "filtering": {},
        "artifact": {"coordinate_space": "level0_px"},
    }
    (tiles / "slide-1.coordinates.meta.json").write_text(json.dumps(tiling))
    return embeddings / "slide-1.pt"


def write_as_atlaspatch(root: Path, features: dict[str, np.ndarray], coords: np.ndarray) -> Path:
    path = root / "patches" / "slide-1.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        read = np.tile(np.array([[256, 256, 1]], np.int32), (len(coords), 1))
        file["coords"] = np.concatenate([coords.astype(np.int32), read], axis=1)
        file["passports"] = np.array([b"slide-1__x0_y0"] * len(coords), "S160")
        if features:
            for name, rows in features.items():
                file.require_group("features")[name] = rows.astype(np.float32)
        file.attrs.update(
            {
                "patch_size": 256,
                "patch_size_level0": 512,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "level0_width": 20_000,
                "level0_height": 10_000,
                "wsi_path": "/data/slide-1.svs",
                "filename": "slide-1.svs",
                "mpp": 0.2525,
                "passport_version": 2,
            }
        )
    return path

"""Patches with masks, slides with weak labels and a small encoder, for the tests of the stage "tile"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from small_cohorts import write_table
from small_slides import tissue_image, write_slide

from maskattn.training.settings import TrainSettings

ENCODER = "timm:test_vit"
SIDE_PX = 160


def write_tile_data(root: Path) -> Path:
    """Thirteen patches of two classes, five slides of four patients, their labels, and weights to begin with."""
    import timm  # after Lightning, which may have to define names for it

    rng = np.random.default_rng(0)
    for index in range(13):
        folder = root / "patches" / ("benign", "tumour")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(rng.normal((200, 110)[index % 2], 25, (SIDE_PX, SIDE_PX, 3)), 0, 255).astype(np.uint8)
        mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        mask[:, : 48 + 16 * (index % 5)] = 255
        Image.fromarray(pixels).save(folder / f"p{index:02d}_0.png")
        Image.fromarray(mask).save(folder / f"p{index:02d}_0_mask.png")
    (root / "slides").mkdir()
    rows = []
    for index, (patient, grade) in enumerate([("p0", 0), ("p1", 1), ("p2", 0), ("p3", 1), ("p0", 0)]):
        darker = np.clip(tissue_image(seed=index).astype(int) - 40 * grade, 0, 255).astype(np.uint8)
        write_slide(root / "slides" / f"s{index}.tiff", darker)
        rows.append({"slide_id": f"s{index}", "patient_id": patient, "grade": grade})
    write_table(root / "labels.csv", rows)
    (root / "split.csv").write_text("train,val,test\np0,p2,\np1,p3,\n")
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    save_file(network.state_dict(), root / "encoder.safetensors")
    return root


def tile_settings(source: str, root: Path, **changed: Any) -> TrainSettings:
    """A small run on the patches or the slides of :func:`write_tile_data`."""
    given: dict[str, Any] = {"stage": "tile", "encoder": ENCODER, "weights": root / "encoder.safetensors"}
    given |= {"token_mask": "tissue", "device": "cpu", "batch_size": 4, "epochs": 3, "lr": 1e-3, "freeze": 4}
    if source == "patches":
        given |= {"patches": root / "patches", "validation_share": 0.3}
    else:
        given |= {"slides": root / "slides", "labels": root / "labels.csv", "target": "grade"}
        given |= {"spacing_um": 1.0, "patch_px": 64, "tiles_per_slide": 3, "validation_tiles": 3}
    return TrainSettings(**{**given, **changed})

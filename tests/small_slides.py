"""Small slides and a small slide model for tests of the pipeline: a disc of tissue on glass, random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
import torch

from maskattn.nn.slide_model import SlideModel, SlideModelConfig

GLASS = 244
SHAPE = (420, 560)
CENTRE, RADIUS = (210, 260), 120


def small_model(name: str = "small", seed: int = 0) -> SlideModel:
    torch.manual_seed(seed)
    encoder = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    config = SlideModelConfig(
        name=name,
        classes=("benign", "low/high"),
        tile_px=64,
        spacing_um=1.0,
        tile_encoder={"patch_size": 16, **encoder},
        slide_encoder={"img_size": 8, **encoder},
        demonstration=True,
        note="Random weights.",
    )
    model = SlideModel(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def tissue_image(shape: tuple[int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: a textured pink disc on glass."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    disc = (rows - CENTRE[0]) ** 2 + (columns - CENTRE[1]) ** 2 < RADIUS**2
    image = np.full((*shape, 3), GLASS, dtype=np.uint8)
    texture = rng.integers(-25, 26, size=(*shape, 1))
    image[disc] = np.clip(np.array([200, 110, 160]) + texture, 0, 255).astype(np.uint8)[disc]
    return image


def write_slide(path: Path, image: np.ndarray | None = None, spacing_um: float | None = 1.0) -> Path:
    """A tiled TIFF that OpenSlide reads; without a spacing if that is None."""
    resolution = {} if spacing_um is None else {"resolution": (1e4 / spacing_um,) * 2, "resolutionunit": "CENTIMETER"}
    image = tissue_image() if image is None else image
    tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), compression="zlib", metadata=None, **resolution)
    return path

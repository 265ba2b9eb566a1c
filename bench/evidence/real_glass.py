"""The share of the class token's attention on glass, plain and masked, with pretrained encoders.

The images are crops of whole sections at a quarter of their size, each about a fifth tissue; the tissue is found by
the package.

Dimension key: B crops, H·W grid tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.evidence.real_images import SIDE_PX, normalised
from bench.evidence.real_weights import Encoder
from bench.evidence.table import Row, markdown_table
from maskattn.explain import AttentionMap
from maskattn.explain.metrics import background_mass
from maskattn.nn import VisionTransformer

__all__ = ["attention_on_glass", "edge_crops"]

_REDUCTION = 4
_STAINED = 0.06  # range of the colour channels, of 1, above which a pixel is taken for tissue


def edge_crops(folder: Path, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return crops (B, 3, 224, 224) with 15 to 30 % of tissue, and their tissue (B, 224, 224) bool."""
    rng, pixels, tissue = np.random.default_rng(seed), [], []
    paths = sorted((folder / "sections").glob("*.jpg"))
    for path in paths:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None  # a whole section
        try:
            with Image.open(path) as image:
                small = np.asarray(image.convert("RGB").reduce(_REDUCTION), dtype=np.float32) / 255
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        spread = torch.from_numpy(small.max(axis=2) - small.min(axis=2))[None, None]
        stained = F.avg_pool2d(spread, 9, stride=1, padding=4)[0, 0] > _STAINED
        dark = torch.from_numpy(small.min(axis=2)) < 0.75
        found, wanted = stained & (F.avg_pool2d(dark[None, None].float(), 9, 1, 4)[0, 0] > 0.1), count // len(paths)
        taken = 0
        for _ in range(20_000):
            y, x = (int(rng.integers(0, side - SIDE_PX)) for side in small.shape[:2])
            mask = found[y : y + SIDE_PX, x : x + SIDE_PX]
            if not 0.15 < mask.float().mean() < 0.30:
                continue
            pixels.append(torch.from_numpy(small[y : y + SIDE_PX, x : x + SIDE_PX].transpose(2, 0, 1).copy()))
            tissue.append(mask)
            taken += 1
            if taken == wanted:
                break
    return torch.stack(pixels), torch.stack(tissue)


def attention_on_glass(
    encoders: dict[str, tuple[VisionTransformer, Encoder]], pixels: Tensor, tissue_BXY: Tensor
) -> str:
    """Return the page's section: the share of the class token's attention to the grid that is on tokens of glass."""
    rows, share = [], 0.0
    for name, (model, how) in encoders.items():
        images = normalised(pixels, how.mean, how.std)
        keep = F.adaptive_max_pool2d(tissue_BXY[:, None].float(), model.patch_embed.grid_of(images))[:, 0] > 0
        share = 1 - float(keep.float().mean())
        for masked in (False, True):
            rows_BHW = AttentionMap(model).attribute(images, keep if masked else None)
            rows.append(
                Row(
                    f"{name}, {'masked' if masked else 'plain'}",
                    {"attention on glass": background_mass(rows_BHW, ~keep)},
                )
            )
    return (
        f"### Attention on glass\n\n{len(pixels)} crops of two sections; about {share:.0%} of the tokens are glass.\n\n"
        + markdown_table(rows)
    )

"""HIPT's patch ViT (ViT-256) as an encoder of tiles: ViT-S/16 over patches of 256 px at 0.5 µm, trained by DINO.

Its weights (``vit256_small_dino.pth``) are in no hub and are given as a file. Pixels are normalised with halves, as
HIPT's own ``eval_transforms`` does. Source: Chen et al., CVPR 2022 (arXiv 2206.02647).
"""

from __future__ import annotations

from pathlib import Path

from maskattn.nn.checkpoints import load_vit
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder

__all__ = ["HIPT_PATCHES", "load_hipt_patches"]

HIPT_PATCHES = "hipt"
"""The name of the encoder."""

_HALVES = (0.5, 0.5, 0.5)
_HEADS = 6
_PATCH_PX, _SPACING_UM = 256, 0.5


def load_hipt_patches(weights: str | Path | None, impl: str | None = None) -> TileEncoder:
    """HIPT's patch ViT from its file of weights.

    Raises:
        ValueError: no file is given.
        FileNotFoundError, UnsupportedModelError: as :func:`maskattn.nn.load_vit` raises them.
    """
    if weights is None:
        raise ValueError(
            f"the encoder {HIPT_PATCHES} must be given the file of its weights, which are in no hub, got none; give "
            "--weights vit256_small_dino.pth (weights=...)"
        )
    vit = load_vit(weights, num_heads=_HEADS, impl=impl, pos_embed_resample="dino")
    return TileEncoder(vit, EncoderCard(HIPT_PATCHES, "token", _HALVES, _HALVES, _PATCH_PX, _PATCH_PX, _SPACING_UM))

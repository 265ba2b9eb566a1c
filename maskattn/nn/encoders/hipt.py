"""HIPT's patch ViT (ViT-256) as a tile encoder: a ViT-S/16 over patches of 256 px at 0.5 µm, trained with DINO.

Its weights (``vit256_small_dino.pth``) are on no hub and are given as a file. Pixels are normalised with mean and
standard deviation 0.5, as in HIPT's ``eval_transforms``. Source: Chen et al., CVPR 2022 (arXiv 2206.02647).
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
    """Load HIPT's patch ViT from its file of weights.

    Raises:
        ValueError: no file is given.
        FileNotFoundError, UnsupportedModelError: as in :func:`maskattn.nn.load_vit`.
    """
    if weights is None:
        raise ValueError(
            f"the encoder {HIPT_PATCHES} needs the file of its weights, which are on no hub, got none; give "
            "--weights vit256_small_dino.pth (weights=...)"
        )
    vit = load_vit(weights, num_heads=_HEADS, impl=impl, pos_embed_resample="dino")
    return TileEncoder(vit, EncoderCard(HIPT_PATCHES, "token", _HALVES, _HALVES, _PATCH_PX, _PATCH_PX, _SPACING_UM))

"""Tile encoders of open_clip's files: image towers with their projection, and the pixels that they were trained on."""

from __future__ import annotations

from typing import Any

from maskattn.nn.adapters.open_clip_files import OpenClipFiles
from maskattn.nn.checkpoints import load_open_clip
from maskattn.nn.encoders.entry import CLIP, Triple, triple_of
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder

__all__ = ["encoder_of_open_clip", "pixel_statistics"]


def encoder_of_open_clip(files: OpenClipFiles, name: str, impl: str | None, arguments: dict[str, Any]) -> TileEncoder:
    """Load the image tower, with the pixels' mean, standard deviation and side that open_clip would take.

    Args:
        files: the model's files.
        name: the encoder's name in outputs.
        impl, arguments: as for :func:`maskattn.nn.load_vit`.

    Raises:
        ValueError: the tower has parts that ours does not have, or its images are not square.
    """
    said = files.said()
    pixels = said.get("preprocess_cfg") or {}
    mean, std = pixel_statistics(said)
    # open_clip takes the side that the network was built for, whatever the images' configuration says.
    side = said.get("model_cfg", {}).get("vision_cfg", {}).get("image_size") or pixels.get("size") or 224
    height, width = (side, side) if isinstance(side, int) else side
    if height != width:
        raise ValueError(f"tiles are square, and the images of an encoder must be too, got {side} for {name}")
    vit = load_open_clip(files, impl, arguments)
    return TileEncoder(vit, EncoderCard(name, vit.global_pool, mean, std, height, height))


def pixel_statistics(said: dict[str, Any]) -> tuple[Triple, Triple]:
    """Return the pixels' mean and standard deviation in ``open_clip_config.json``, or CLIP's if it has none."""
    pixels = said.get("preprocess_cfg") or {}
    return triple_of(pixels.get("mean") or CLIP[0]), triple_of(pixels.get("std") or CLIP[1])

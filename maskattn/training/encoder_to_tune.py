"""The encoder from which fine-tuning starts: a packed vision transformer."""

from __future__ import annotations

import maskattn.training.lightning  # noqa: F401 (timm can then be imported beside a torchvision of another torch)
from maskattn.nn.encoders.loading import load_encoder
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.vit import VisionTransformer
from maskattn.training.settings import TrainSettings

__all__ = ["encoder_to_tune", "packed_of"]


def encoder_to_tune(settings: TrainSettings) -> TileEncoder:
    """Load the encoder with its initial weights.

    Raises:
        ValueError: the settings name no encoder, or it cannot be fine-tuned.
    """
    if settings.encoder is None:
        raise ValueError(
            "--stage tile must have --encoder, which is fine-tuned, got none; `maskattn encoders` lists them"
        )
    encoder = load_encoder(settings.encoder, impl=settings.impl, weights=settings.weights)
    packed_of(encoder)
    return encoder


def packed_of(encoder: TileEncoder) -> VisionTransformer:
    """Return the transformer of an encoder.

    Raises:
        ValueError: it is not a packed transformer.
    """
    if encoder.vit is None:
        raise ValueError(
            f"--stage tile fine-tunes packed vision transformers, got {encoder.name}: {encoder.why_not}; choose another"
        )
    return encoder.vit

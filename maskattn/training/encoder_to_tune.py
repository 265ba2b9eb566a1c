"""The encoder that a fine-tuning begins with: a packed vision transformer."""

from __future__ import annotations

from maskattn.nn.encoders.loading import load_encoder
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.vit import VisionTransformer
from maskattn.training.settings import TrainSettings

__all__ = ["encoder_to_tune", "packed_of"]


def encoder_to_tune(settings: TrainSettings) -> TileEncoder:
    """The encoder with the weights to begin with.

    Raises:
        ValueError: none is asked for, or it cannot be fine-tuned.
    """
    if settings.encoder is None:
        raise ValueError(
            "--stage tile must have --encoder, which is fine-tuned, got none; `maskattn encoders` lists them"
        )
    encoder = load_encoder(settings.encoder, impl=settings.impl, weights=settings.weights)
    packed_of(encoder)
    return encoder


def packed_of(encoder: TileEncoder) -> VisionTransformer:
    """The transformer of an encoder.

    Raises:
        ValueError: it is no packed transformer.
    """
    if encoder.vit is None:
        raise ValueError(
            f"--stage tile fine-tunes packed vision transformers, got {encoder.name}: {encoder.why_not}; choose another"
        )
    return encoder.vit

"""A tile encoder together with the slide head that reads its embeddings, as slide inference runs them.

Dimension key: B tiles, T kept tiles, (h, w) tokens of a tile, C channels, K classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from maskattn.nn.encoders.regions import RegionEncoder
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.slide_models.card import EncoderFacts, ModelCard
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["TwoStageModel", "card_of", "two_stages", "with_encoder"]


class TwoStageModel(nn.Module):
    """A tile encoder and a slide head.

    Args:
        head: the slide head, in eval mode.
        card: the model's card, with the encoder's facts on tiles (:func:`with_encoder`).
        encoder: the tile encoder; None if runs read stored features.
        whole: the model of this package that head and encoder belong to; None for a head of another origin.
        region_level: transformer that embeds regions from stored features of their patches; None takes that of
            ``encoder`` if it is a :class:`RegionEncoder`.

    Raises:
        ValueError: the encoder's features do not have the head's width, or the number of class names is not K.
    """

    def __init__(
        self,
        head: SlideHead,
        card: ModelCard,
        encoder: TileEncoder | None = None,
        whole: SlideModel | None = None,
        region_level: VisionTransformer | None = None,
    ) -> None:
        super().__init__()
        if len(card.classes) != head.num_classes:
            raise ValueError(
                f"a slide model must have a name for each class, got {len(card.classes)} names, "
                f"{', '.join(card.classes)}, for {head.num_classes} logits; name them with --classes"
            )
        if encoder is not None and encoder.embed_dim != head.in_dim:
            raise ValueError(
                f"the encoder's features must have the width that the slide model reads, {head.in_dim}, got "
                f"{encoder.embed_dim} channels of {encoder.name}; take the encoder that the model was trained with"
            )
        self.head = head
        self.encoder = encoder
        self.whole = [whole]  # in a list, so that it is not registered as a submodule
        self.card = card
        self._region_level = region_level

    @property
    def region_level(self) -> VisionTransformer | None:
        """The encoder that embeds regions from features of their patches; None where the head reads tiles."""
        if self._region_level is None and isinstance(self.encoder, RegionEncoder):
            return self.encoder.levels.region_encoder
        return self._region_level

    @property
    def why_no_tiles(self) -> str:
        """The reason why tiles cannot be encoded, with the remedy; empty if they can."""
        if self.encoder is not None and self.card.spacing_um is not None:
            return ""
        if self.encoder is not None:
            return (
                f"tiles must have a spacing, got none from {self.card.name} or {self.encoder.name}; give "
                "--tile-spacing-um with the spacing that the model was trained at, for instance 0.5"
            )
        if self._region_level is not None:
            return (
                f"a model of regions must be run with an encoder of patches, got none for {self.card.name}; give "
                "--encoder hipt --weights vit256_small_dino.pth, or the encoder that the model was trained with, or a "
                "folder of stored features of patches (--features)"
            )
        return (
            f"a slide model reads features of tiles, got none for {self.card.name}; name the encoder that it was "
            "trained with (--encoder), or give a folder of its features (--features)"
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.head.parameters()).device

    @property
    def config(self) -> SlideModelConfig | ModelCard:
        """The configuration that outputs record, with the model's name and classes."""
        return self.card if self.whole[0] is None else self.whole[0].config

    @property
    def leaves_out(self) -> bool:
        """Whether background is left out, as tiles or as tokens."""
        return self.whole[0] is None or self.whole[0].config.masked

    @property
    def masks_tokens(self) -> bool:
        """Whether the encoder receives a mask of the tokens to keep."""
        return self.whole[0] is not None or self.card.token_mask == "tissue"

    @property
    def token_px(self) -> int:
        """The side of a token in px of a tile; the side of the tile if there is no transformer."""
        return self.encoder.token_px if self.encoder is not None else (self.card.tile_px or 1)

    @property
    def why_no_tokens(self) -> str:
        """The reason why there are no token maps; empty if there are."""
        if self.encoder is None:
            return "no tile encoder was given"
        if self.encoder.vit is not None:
            return ""
        return f"{self.encoder.name} is no packed vision transformer: {self.encoder.why_not}"

    def encode_tiles(
        self, tiles_BIXY: UInt8[Tensor, "B 3 X Y"], keep_BHW: Bool[Tensor, "B h w"] | None
    ) -> Float[Tensor, "B C"]:
        """Embed tiles: (B, 3, X, Y) uint8 and the tokens to keep (B, h, w), None for all → (B, C)."""
        assert self.encoder is not None, "a run without an encoder has features"
        return self.encoder.encode_tiles(tiles_BIXY, keep_BHW)

    def scores(self, logits_K: Float[Tensor, "K"]) -> Float[Tensor, "K"]:
        """Turn logits into scores: class probabilities, or the values themselves for regression and survival."""
        return logits_K if self.card.gives_values else (logits_K / self.card.temperature).softmax(dim=0)

    def identity(self) -> str:
        """Return the SHA-256 of configuration and weights; models with the same identity make the same predictions."""
        if self.whole[0] is not None:
            return self.whole[0].identity()
        digest = hashlib.sha256(self.card.to_json().encode())
        digest.update(b"" if self.encoder is None else self.encoder.sha256.encode())
        state = self.head.state_dict()
        if self._region_level is not None:
            state |= {f"region_level.{name}": x for name, x in self._region_level.state_dict().items()}
        for name, x in sorted(state.items()):
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def two_stages(model: SlideModel | TwoStageModel) -> TwoStageModel:
    """Split this package's own slide model into encoder and head; a :class:`TwoStageModel` is returned unchanged."""
    if isinstance(model, TwoStageModel):
        return model
    config = model.config
    card = EncoderCard(
        name=config.name,
        pooling=model.tile_encoder.global_pool,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        tile_px=config.tile_px,
        patch_px=config.tile_px,
        spacing_um=config.spacing_um,
    )
    encoder = TileEncoder(model.tile_encoder, card).to(model.pixel_mean.device, model.pixel_mean.dtype)
    return TwoStageModel(ViTHead(model.slide_encoder), card_of(model), encoder.eval(), model).eval()


def card_of(model: SlideModel) -> ModelCard:
    """Return the card of this package's own slide model."""
    config = model.config
    return ModelCard(
        name=config.name,
        kind="slide_model",
        classes=config.classes,
        encoder=EncoderFacts(config.name, model.tile_encoder.embed_dim),
        tile_px=config.tile_px,
        patch_px=config.tile_px,
        spacing_um=config.spacing_um,
        token_mask="tissue" if config.masked else "none",
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        demonstration=config.demonstration,
        note=config.note,
        slide_model=config.as_dict(),
    )


def with_encoder(card: ModelCard, encoder: TileEncoder, **tiles: object) -> ModelCard:
    """Return the card of a model that is run with an encoder; facts that it lacks are taken from the encoder.

    Args:
        card: the card of the model as it was trained.
        encoder: the encoder of the run.
        tiles: fields of the card that the run sets; None leaves a field as it is.
    """
    own = {
        "tile_px": encoder.tile_px,
        "patch_px": encoder.patch_px,
        "spacing_um": encoder.spacing_um,
        "token_mask": "none",
        "pixel_mean": tuple(encoder.card.pixel_mean),
        "pixel_std": tuple(encoder.card.pixel_std),
    }
    given = {name: value for name, value in tiles.items() if value is not None}
    missing = {name: value for name, value in own.items() if getattr(card, name) is None}
    facts = EncoderFacts(encoder.name, encoder.embed_dim, encoder.sha256)
    return replace(card, **{"encoder": facts, **missing, **given})  # type: ignore[arg-type]  # fields of the card

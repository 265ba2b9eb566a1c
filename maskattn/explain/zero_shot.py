"""A slide's zero-shot scores for text concepts, and their maps, with the tile pooling of MI-Zero.

Each tile's score for concept k is temperature · cos(z_t, w_k), with z_t the tile's embedding by the image tower and its
projection. The slide's score is the mean over all tiles, or over the best ones for each concept. It is linear in the
tiles' scores: a tile's relevance is its score times its share of the pool, and the sum is exactly the slide's score.
The tokens of a tile are explained by the score of their tile times that share.

Source: Lu et al., arXiv 2306.07831 (MI-Zero), for the pooling.

Dimension key: K concepts, T tiles of a slide, B tiles of a batch, h·w tokens of a tile, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskattn.explain.explainer import as_maps
from maskattn.explain.hierarchical import LevelMethod
from maskattn.explain.methods import DEFAULT_METHOD
from maskattn.explain.packed_model import check_explainable, packed_model
from maskattn.explain.single_image import normalisation_of
from maskattn.explain.text_concepts import TextConcepts
from maskattn.nn.checkpoints import load_vit
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.slide_models.card import ModelCard
from maskattn.nn.slide_models.two_stage import TwoStageModel, with_encoder
from maskattn.nn.slide_models.zero_shot import ZeroShotHead
from maskattn.shapes import Bool, Float

__all__ = ["ZeroShotScores", "ZeroShotSlide", "zero_shot_head", "zero_shot_model"]


@dataclass(frozen=True)
class ZeroShotScores:
    """The scores of a slide and of its tiles for each concept.

    Attributes:
        scores_K: (K,), the slide's scores.
        tile_scores_KT: (K, T), each tile's score.
        share_KT: (K, T), each tile's share of the pool; the shares of a concept sum to 1.
    """

    scores_K: Float[Tensor, "K"]
    tile_scores_KT: Float[Tensor, "K T"]
    share_KT: Float[Tensor, "K T"]

    @property
    def relevance_KT(self) -> Float[Tensor, "K T"]:  # noqa: N802 (a dimension key)
        """(K, T), each tile's contribution to the slide's score."""
        return self.share_KT * self.tile_scores_KT


class ZeroShotSlide:
    """Zero-shot scores of a slide, and their maps.

    Args:
        encoder: the image tower with its projection; see :func:`maskattn.nn.checkpoints.load_vit`.
        concepts: concepts in the space of its output.
        best: number of highest-scoring tiles that are pooled for each concept; None pools all.
        method: a key of :data:`maskattn.explain.METHODS` that explains slide models.
        options: options of the method (``m``).

    Raises:
        TypeError, ValueError: the encoder cannot be explained, or there is no such method or number of tiles.

    Example:
        >>> from maskattn.nn import VisionTransformer
        >>> tower = VisionTransformer(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=8).eval()
        >>> slide = ZeroShotSlide(tower, TextConcepts(("gland", "fat"), torch.randn(2, 8)), best=3)
        >>> slide.tiles(tower(torch.randn(5, 3, 64, 64))).relevance_KT.shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        concepts: TextConcepts,
        best: int | None = None,
        method: str = DEFAULT_METHOD,
        **options: Any,
    ) -> None:
        self.encoder = packed_model(encoder)
        self.concepts = replace(concepts, bias=0.0)
        self.head = zero_shot_head(concepts, best)
        self.level = LevelMethod.named(method, self.encoder, **options)

    @torch.no_grad()
    def tiles(self, embeddings_TC: Float[Tensor, "T C"]) -> ZeroShotScores:
        """Compute the slide's scores from the encoder's output for each tile.

        Raises:
            ValueError: there is no tile, or the embeddings have another width than the concepts.
        """
        if not len(embeddings_TC):
            raise ValueError(
                "a slide's scores are pooled from its tiles, of which there must be at least one, got none"
            )
        scores_KT = self.concepts(embeddings_TC).T
        share_KT = self.head.shares(scores_KT)
        return ZeroShotScores((share_KT * scores_KT).sum(dim=1), scores_KT, share_KT)

    @torch.inference_mode(False)
    def tokens(
        self,
        tiles_BIXY: Float[Tensor, "B I X Y"],
        share_KB: Float[Tensor, "K B"],
        keep: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "K B h w"]:
        """Compute the relevance of some tiles' tokens for the slide's scores; 0 for tiles outside a concept's pool.

        Args:
            tiles_BIXY: (B, in_chans, X, Y), normalised as the encoder expects.
            share_KB: (K, B), the columns of :attr:`ZeroShotScores.share_KT` for these tiles.
            keep: (B, h·w) or (B, h, w) bool over each tile's tokens; None keeps all.

        Raises:
            ValueError: dropout is active (train mode), or tiles or keep do not fit the encoder.
        """
        check_explainable(self.encoder)
        with torch.no_grad():
            tokens = self.encoder.before_last_block(self.encoder.embed(tiles_BIXY, keep))
        relevance_KT, _ = self.level.explain(self.encoder, tokens, lambda z_BC: self.concepts(z_BC) * share_KB.T)
        return as_maps(relevance_KT, tokens).transpose(0, 1)


def zero_shot_head(concepts: TextConcepts, best: int | None = None) -> ZeroShotHead:
    """Build a slide head from concepts; it reads tile embeddings in their space.

    Args:
        concepts: the K concepts.
        best: number of highest-scoring tiles that are pooled for each concept; None pools all.
    """
    K, C = concepts.vectors_KC.shape
    head = ZeroShotHead(C, K, best, concepts.temperature).to(concepts.vectors_KC.dtype).eval()
    head.vectors.copy_(concepts.vectors_KC)
    return head


def zero_shot_model(
    source: str | None,
    concepts: TextConcepts,
    best: int | None = None,
    *,
    spacing_um: float = 0.5,
    patch_px: int | None = None,
    token_mask: str | None = None,
    **options: Any,
) -> TwoStageModel:
    """Build a slide model from an image tower and concepts.

    Args:
        source: source of the tower with its projection, see :func:`maskattn.nn.checkpoints.load_vit`; None if stored
            features are used instead.
        concepts, best: see :func:`zero_shot_head`.
        spacing_um: µm per px of the tiles.
        patch_px: side of a tile in px; None takes the tower's own.
        token_mask: "tissue" masks a tile's glass tokens in the tower; None is "none".
        options: options of ``load_vit``.

    Raises:
        ValueError: the tower's output has another width than the concepts.
    """
    head = zero_shot_head(concepts, best)
    about = ModelCard(name="zero-shot", kind="zero_shot", classes=concepts.names, head=head.arguments())
    if source is None:
        return TwoStageModel(head, about).eval()
    vit = load_vit(source, **options)
    side = vit.grid_HW[0] * vit.patch_embed.patch_size
    mean, std = normalisation_of(source)
    name = source.rstrip("/").rpartition("/")[2]
    card = EncoderCard(
        name=name,
        pooling=vit.global_pool,
        pixel_mean=mean,
        pixel_std=std,
        tile_px=side,
        patch_px=patch_px or side,
        spacing_um=spacing_um,
    )
    encoder = TileEncoder(vit, card).eval()
    of_run = with_encoder(replace(about, name=f"zero-shot by {name}"), encoder, token_mask=token_mask)
    return TwoStageModel(head, of_run, encoder).eval()

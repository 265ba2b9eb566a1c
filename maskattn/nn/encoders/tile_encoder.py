"""A tile encoder: it maps the pixels of tiles to feature vectors, with or without their background tokens.

A network that can be converted to a packed vision transformer runs as one, whether tokens are masked or not; without
a mask its features equal the library's to float rounding. Any other network runs as its library built it, without
masks.

Dimension key: B tiles, (h, w) tokens of a tile, C features.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from maskattn.nn.encoders.entry import Triple
from maskattn.nn.encoders.pixels import centre_of, normalised, tokens_of_tiles
from maskattn.nn.inference_linear import rounded_up, rows_at_once
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["EncoderCard", "TileEncoder"]


@dataclass(frozen=True)
class EncoderCard:
    """The metadata of a tile encoder.

    Attributes:
        name: the encoder's name in outputs.
        pooling: the pooling of its tokens: "token", "avg", "token_avg", "map", "coca", or "own" if the library's module
            pools.
        pixel_mean, pixel_std: the statistics per channel, of pixels scaled to [0, 1].
        tile_px: the side of the encoder's input image, in px.
        patch_px: the side of the square that is cut from the slide, in px at ``spacing_um``, then resized to
            ``tile_px``.
        spacing_um: the pixel size of that square, in µm; None if the encoder has none of its own.
        crop_px: the side of the centre crop that the network sees, in px; None if it sees the entire tile.
        licence: the licence of the weights; empty if unknown.
        why_not: the reason why there is no packed transformer; empty if there is one.
    """

    name: str
    pooling: str
    pixel_mean: Triple
    pixel_std: Triple
    tile_px: int
    patch_px: int
    spacing_um: float | None = None
    crop_px: int | None = None
    licence: str = ""
    why_not: str = ""


class TileEncoder(nn.Module):
    """A network that computes features of tiles, with its metadata.

    Args:
        network: a packed :class:`VisionTransformer`, or any module from normalised images (B, 3, X, Y) to (B, C).
        card: the encoder's metadata.
        embed_dim: C; None takes the packed transformer's.

    Attributes:
        card: as given.
        vit: the packed transformer; None if there is none.
        module: the library's own network; None if there is a packed transformer.
        embed_dim: C.
        tiles_at_once: the largest number of tiles in memory; None leaves it to the caller.
        min_tissue: the smallest share of tissue of a tile that is encoded; None leaves it to the caller.

    Raises:
        ValueError: the tiles' side and the network's tokens do not fit each other.
    """

    tiles_at_once: ClassVar[int | None] = None
    min_tissue: ClassVar[float | None] = None

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, network: nn.Module, card: EncoderCard, embed_dim: int | None = None) -> None:
        super().__init__()
        packed = isinstance(network, VisionTransformer)
        self.card = card
        self.vit: VisionTransformer | None = network if isinstance(network, VisionTransformer) else None
        self.module: nn.Module | None = None if packed else network
        if self.vit is not None:
            _check_sides(card, self.token_px)
            embed_dim = self.vit.num_classes or self.vit.head_hidden_size
        if embed_dim is None:
            raise ValueError(
                f"embed_dim must be given for a library's own module, got None for {card.name}; give its width"
            )
        self.embed_dim = embed_dim
        self.register_buffer("pixel_mean", torch.tensor(card.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(card.pixel_std), persistent=False)

    @property
    def name(self) -> str:
        """The encoder's name in outputs."""
        return self.card.name

    @property
    def pooling(self) -> str:
        """The pooling of tokens into one feature vector: see :class:`EncoderCard`."""
        return self.card.pooling

    @property
    def tile_px(self) -> int:
        """The side of the encoder's input image, in px."""
        return self.card.tile_px

    @property
    def patch_px(self) -> int:
        """The side of the square that is cut from the slide, in px at ``spacing_um``, and resized to ``tile_px``."""
        return self.card.patch_px

    @property
    def spacing_um(self) -> float | None:
        """The pixel size of that square, in µm; None if the encoder has none of its own."""
        return self.card.spacing_um

    @property
    def why_not(self) -> str:
        """The reason why there is no packed transformer; empty if there is one."""
        return self.card.why_not

    @property
    def token_px(self) -> int:
        """The side of a token, in px of the tile; the tile's own side if there is no packed transformer."""
        return self.card.tile_px if self.vit is None else int(self.vit.patch_embed.patch_size)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pixel_mean.device

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the names and values of the weights; encoders with the same digest give the same features."""
        digest = hashlib.sha256()
        for name, x in sorted((self.vit or self.module).state_dict().items()):  # type: ignore[union-attr]  # one is there
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def tile_tokens(
        self, tiles_BIXY: UInt8[Tensor, "B 3 X Y"], keep_BHW: Bool[Tensor, "B h w"] | None = None
    ) -> PackedTokens:
        """Embed the tokens of tiles as packed tokens for the transformer's blocks; only kept pixels are converted.

        Args:
            tiles_BIXY: (B, 3, tile_px, tile_px) uint8, RGB.
            keep_BHW: (B, h, w) bool over each tile's tokens; None keeps all.

        Raises:
            ValueError: there is no packed transformer, or the mask does not fit.
            TypeError: the tiles are not uint8.
        """
        if self.vit is None:
            raise ValueError(f"only a packed vision transformer has tokens, and {self.name} is none: {self.why_not}")
        crop = self.card.crop_px
        if crop is not None:
            tiles_BIXY = centre_of(tiles_BIXY, crop)
            keep_BHW = None if keep_BHW is None else centre_of(keep_BHW, crop // self.token_px)
        return tokens_of_tiles(self.vit, tiles_BIXY, keep_BHW, self.pixel_mean, self.pixel_std)

    def encode_tiles(
        self, tiles_BIXY: UInt8[Tensor, "B 3 X Y"], keep_BHW: Bool[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Compute features of tiles; any network can do so without a mask. Arguments as in :meth:`tile_tokens`."""
        if self.vit is not None:
            return torch.cat([self._encode(*part) for part in self._parts(tiles_BIXY, keep_BHW)])
        if keep_BHW is not None:
            raise ValueError(
                f"masked attention needs a packed vision transformer, and {self.name} is none: {self.why_not}; encode "
                "all tokens of its tiles (keep=None, --token-mask none)"
            )
        assert self.module is not None, "a network is one or the other"
        tiles_BIXY = tiles_BIXY if self.card.crop_px is None else centre_of(tiles_BIXY, self.card.crop_px)
        pooled: Tensor = self.module(normalised(tiles_BIXY, self.pixel_mean, self.pixel_std))
        if pooled.shape != (len(tiles_BIXY), self.embed_dim):
            raise ValueError(
                f"{self.name} must give ({len(tiles_BIXY)}, {self.embed_dim}) features for as many tiles, got "
                f"{tuple(pooled.shape)}; name a network that pools"
            )
        return pooled

    forward = encode_tiles

    def _encode(self, tiles_BIXY: Tensor, keep_BHW: Tensor | None) -> Tensor:
        assert self.vit is not None, "called only with a packed transformer"
        features: Tensor = self.vit(rounded_up(self.tile_tokens(tiles_BIXY, keep_BHW)))
        return features[: len(tiles_BIXY)]

    def _parts(self, tiles_BIXY: Tensor, keep_BHW: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Divide a batch so that on a CPU the tokens of a part, and what a block makes of them, stay in its cache."""
        most, B = rows_at_once(self.pixel_mean), len(tiles_BIXY)
        if most is None or B < 2:
            return [(tiles_BIXY, keep_BHW)]
        side = (self.card.crop_px or self.card.tile_px) // self.token_px
        tokens = B * side**2 if keep_BHW is None else int(keep_BHW.count_nonzero())
        size = math.ceil(B / math.ceil(max(1, tokens) / most))
        keeps = [None] * math.ceil(B / size) if keep_BHW is None else keep_BHW.split(size)
        return list(zip(tiles_BIXY.split(size), keeps, strict=True))


def _check_sides(card: EncoderCard, token_px: int) -> None:
    margin = 0 if card.crop_px is None else card.tile_px - card.crop_px
    if card.tile_px % token_px or margin % (2 * token_px):
        raise ValueError(
            f"a tile's side, and each margin around its centre crop, must be a multiple of the token's {token_px} px, "
            f"got tile_px={card.tile_px}, crop_px={card.crop_px} for {card.name}; the nearest sides are "
            f"{card.tile_px // token_px * token_px} and {(card.tile_px // token_px + 1) * token_px}"
        )

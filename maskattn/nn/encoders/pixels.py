"""From a tile's pixels to what a network starts with: scaled, normalised, and under a mask the kept patches alone."""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.nn.kept_tokens import packing_of
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["centre_of", "check_pixels", "normalised", "tokens_of_tiles"]


def check_pixels(tiles_BIXY: Tensor) -> None:
    """Refuse what is no batch of RGB pixels.

    Raises:
        TypeError: the tiles are not uint8.
        ValueError: they are not (B, 3, X, Y).
    """
    if tiles_BIXY.dtype != torch.uint8:
        raise TypeError(f"tiles must be uint8 RGB pixels, got dtype {tiles_BIXY.dtype}; the model itself scales them")
    if tiles_BIXY.ndim != 4 or tiles_BIXY.shape[1] != 3:
        raise ValueError(f"tiles must be (B, 3, X, Y) RGB pixels, got tiles.shape={tuple(tiles_BIXY.shape)}")


def tokens_of_tiles(
    vit: VisionTransformer,
    tiles_BIXY: UInt8[Tensor, "B 3 X Y"],
    keep_BHW: Bool[Tensor, "B h w"] | None,
    pixel_mean: Float[Tensor, "3"],
    pixel_std: Float[Tensor, "3"],
) -> PackedTokens:
    """The packed tokens with which a transformer starts; only kept pixels are converted.

    Args:
        vit: the transformer.
        tiles_BIXY: (B, 3, X, Y) uint8, RGB.
        keep_BHW: (B, h, w) bool over each tile's tokens; None keeps all.
        pixel_mean, pixel_std: per channel, of pixels scaled to [0, 1].

    Raises:
        TypeError, ValueError: the tiles are no RGB pixels, or the mask does not fit them.
    """
    check_pixels(tiles_BIXY)
    grid_HW = vit.patch_embed.grid_of(tiles_BIXY)
    packing = packing_of(keep_BHW, tiles_BIXY.shape[0], grid_HW, tiles_BIXY.device)
    patches = vit.patch_embed.cut(tiles_BIXY, packing).to(pixel_mean.dtype).unflatten(1, (3, -1))  # [T, 3, p·p]
    patches = (patches / 255 - pixel_mean[:, None]) / pixel_std[:, None]
    return vit.embed_patches(patches.flatten(1), packing, grid_HW)


def normalised(
    tiles_BIXY: UInt8[Tensor, "B 3 X Y"], pixel_mean: Float[Tensor, "3"], pixel_std: Float[Tensor, "3"]
) -> Float[Tensor, "B 3 X Y"]:
    """Tiles as the libraries' own networks take them. Arguments as in :func:`tokens_of_tiles`."""
    check_pixels(tiles_BIXY)
    return (tiles_BIXY.to(pixel_mean.dtype) / 255 - pixel_mean[:, None, None]) / pixel_std[:, None, None]


def centre_of(images: Tensor, side: int) -> Tensor:
    """The square of this side in the middle of the two last dimensions.

    Raises:
        ValueError: it does not fit in.
    """
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    if top < 0 or left < 0:
        raise ValueError(f"a centre of {side} px must fit into its image, got images.shape={tuple(images.shape)}")
    return images[..., top : top + side, left : left + side]

"""Preparation of a tile's pixels for a network: checked, scaled, normalised and, under a mask, cut to kept patches."""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.nn.kept_tokens import packing_of
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["centre_of", "check_pixels", "normalised", "tokens_of_tiles"]


def check_pixels(tiles_BIXY: Tensor) -> None:
    """Check that tiles are a batch of RGB pixels.

    Raises:
        TypeError: the tiles are not uint8.
        ValueError: the tiles are not (B, 3, X, Y).
    """
    if tiles_BIXY.dtype != torch.uint8:
        raise TypeError(
            f"tiles must be uint8 RGB pixels, got dtype {tiles_BIXY.dtype}; pass them unscaled, the model scales them"
        )
    if tiles_BIXY.ndim != 4 or tiles_BIXY.shape[1] != 3:
        raise ValueError(f"tiles must be (B, 3, X, Y) RGB pixels, got tiles.shape={tuple(tiles_BIXY.shape)}")


def tokens_of_tiles(
    vit: VisionTransformer,
    tiles_BIXY: UInt8[Tensor, "B 3 X Y"],
    keep_BHW: Bool[Tensor, "B h w"] | None,
    pixel_mean: Float[Tensor, "3"],
    pixel_std: Float[Tensor, "3"],
) -> PackedTokens:
    """Embed the tokens of tiles as packed tokens for a transformer's blocks; only kept pixels are converted.

    Args:
        vit: the transformer.
        tiles_BIXY: (B, 3, X, Y) uint8, RGB.
        keep_BHW: (B, h, w) bool over each tile's tokens; None keeps all.
        pixel_mean, pixel_std: the statistics per channel, of pixels scaled to [0, 1].

    Raises:
        TypeError, ValueError: the tiles are not RGB pixels, or the mask does not fit them.
    """
    check_pixels(tiles_BIXY)
    grid_HW = vit.patch_embed.grid_of(tiles_BIXY)
    packing = packing_of(keep_BHW, tiles_BIXY.shape[0], grid_HW, tiles_BIXY.device)
    patches = vit.patch_embed.cut(tiles_BIXY, packing).to(pixel_mean.dtype).unflatten(1, (3, -1))  # [T, 3, p·p]
    _normalise(patches, pixel_mean[:, None], pixel_std[:, None])
    return vit.embed_patches(patches.flatten(1), packing, grid_HW)


def normalised(
    tiles_BIXY: UInt8[Tensor, "B 3 X Y"], pixel_mean: Float[Tensor, "3"], pixel_std: Float[Tensor, "3"]
) -> Float[Tensor, "B 3 X Y"]:
    """Normalise tiles for the libraries' own networks. Arguments and errors as in :func:`tokens_of_tiles`."""
    check_pixels(tiles_BIXY)
    images = tiles_BIXY.to(pixel_mean.dtype)
    _normalise(images, pixel_mean[:, None, None], pixel_std[:, None, None])
    return images


def _normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> None:
    """Scale pixels of 0 to 255 and normalise them, in place: memory written for the first time costs more than that."""
    pixels.div_(255).sub_(mean).div_(std)


def centre_of(images: Tensor, side: int) -> Tensor:
    """Crop the central square of this side from the last two dimensions.

    Raises:
        ValueError: the square is larger than the image.
    """
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    if top < 0 or left < 0:
        raise ValueError(f"a centre crop of {side} px must fit into its image, got images.shape={tuple(images.shape)}")
    return images[..., top : top + side, left : left + side]

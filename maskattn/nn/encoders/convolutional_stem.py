"""The patch embedding of CTransPath: three convolutions in place of one (Wang et al., Medical Image Analysis 2022).

Dimension key: B images, X and Y pixels, H and W tokens of 4 px, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from maskattn.shapes import Float

__all__ = ["ConvolutionalStem"]


class ConvolutionalStem(nn.Module):
    """Embed patches of 4 px by two strided 3 × 3 convolutions with batch norm and one of 1 × 1.

    Args:
        img_size: side of the images in px, or (height, width).
        patch_size: side of a token, in px; only 4.
        in_chans: channels of the images.
        embed_dim: width of the tokens.
        norm_layer: the norm of the tokens.
        more: what timm's Swin transformer hands to any patch embedding and this one does not need.

    Attributes:
        grid_size: (H, W) of an image of ``img_size``.

    Raises:
        ValueError: the patches are not of 4 px.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        **more: Any,
    ) -> None:
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"a stem of two strided convolutions makes patches of 4 px, got patch_size={patch_size}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = (height // patch_size, width // patch_size)
        layers: list[nn.Module] = []
        width = in_chans
        for out in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, x_BIXY: Float[Tensor, "B I X Y"]) -> Float[Tensor, "B H W C"]:
        """(B, in_chans, X, Y) images → (B, H, W, C) tokens."""
        tokens: Tensor = self.norm(self.proj(x_BIXY).permute(0, 2, 3, 1))
        return tokens

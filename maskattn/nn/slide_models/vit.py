"""The vision transformer of this package as a slide head, with masked attention over the tiles in the slide's grid.

It serves every slide model that is a pre-norm transformer over projected tiles with a class token or mean pooling: this
package's own, STAMP's without ALiBi, and TITAN's pretraining stage with a linear head.

Dimension key: T tiles, C channels, K classes, A heads of the last block.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.slide_models.attention_rows import rolled_out
from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float, Int

__all__ = ["ViTHead", "first_row", "tokens_on_grid"]


class ViTHead(SlideHead):
    """A vision transformer over a slide's tiles, whose outputs are the logits.

    Args:
        vit: transformer with patch_size 1, in_chans C and num_classes K, or the arguments that rebuild it.
        impl: implementation of the attention if ``vit`` is a dict of arguments; None takes the best.

    Raises:
        ValueError: the transformer's patch_size is not 1, or it has no head.
    """

    kind: ClassVar[str] = "vit"
    has_layers = True
    reads_divided_tiles = True

    def __init__(self, vit: VisionTransformer | dict[str, Any], impl: str | None = None) -> None:
        encoder = VisionTransformer(**{**vit, "impl": impl}) if isinstance(vit, dict) else vit
        if encoder.patch_embed.patch_size != 1 or not encoder.num_classes:
            raise ValueError(
                "a slide head must be a transformer of patch_size 1 with a head, got patch_size="
                f"{encoder.patch_embed.patch_size}, num_classes={encoder.num_classes}; build it with num_classes"
            )
        super().__init__(encoder.patch_embed.in_chans, encoder.num_classes)
        self.vit = encoder
        self.reads_grid = encoder.position_kind != "none"

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {"vit": {name: value for name, value in self.vit.arguments.items() if name != "impl"}}

    def tokens(
        self, embeddings_TC: Float[Tensor, "T C"], grid: TileGrid | None
    ) -> tuple[PackedTokens, Int[Tensor, "T"]]:
        """Return the packed tokens at the transformer's input, and (T,), the tile index of each."""
        return tokens_on_grid(self.vit, embeddings_TC, grid)

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        logits: Tensor = self.vit(self.tokens(embeddings_TC, grid)[0])[0]
        return logits

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        if self.vit.cls_token is None:
            return None
        tokens, order_T = self.tokens(embeddings_TC, grid)
        rows_AT = self.vit.last_block.read_weights(self.vit.before_last_block(tokens))[:, tokens.own_prefix :]
        return torch.empty_like(rows_AT).index_copy_(1, order_T, rows_AT)

    def rollout(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        tokens, order_T = self.tokens(embeddings_TC, grid)
        row_N = first_row(tokens, self.vit.global_pool == "token")
        row_T = rolled_out(self.vit, tokens, row_N)[tokens.num_prefix :]
        return torch.empty_like(row_T).index_copy_(0, order_T, row_T)


def first_row(tokens: PackedTokens, of_class_token: bool) -> Float[Tensor, "N"]:
    """Return the row that rollout starts with: 1 at the class token, or uniform over all tiles."""
    row_N = tokens.rows_TC.new_zeros(len(tokens.rows_TC))
    if of_class_token:
        row_N[0] = 1
    else:
        row_N[tokens.num_prefix :] = 1 / (len(row_N) - tokens.num_prefix)
    return row_N


def tokens_on_grid(
    vit: VisionTransformer, embeddings_TC: Float[Tensor, "T C"], grid: TileGrid | None
) -> tuple[PackedTokens, Int[Tensor, "T"]]:
    """Embed a slide's tiles as packed tokens, the input of a transformer's first block.

    Args:
        vit: transformer with patch_size 1.
        embeddings_TC: (T, C), in any order.
        grid: the tiles' cells; None puts them in one row, for a transformer without positions. With a group, T counts
            this process's tiles.

    Returns:
        The tokens in row-major order, and (T,), the tile index of each grid token.
    """
    device = embeddings_TC.device
    if grid is None:
        line = torch.arange(len(embeddings_TC), device=device)
        grid = TileGrid(torch.zeros_like(line), line, (1, len(line)))
    packing, order_T = TileGrid(grid.rows_T.to(device), grid.columns_T.to(device), grid.shape_HW).packing()
    return vit.embed_patches(embeddings_TC[order_T], packing, grid.shape_HW, grid.group), order_T

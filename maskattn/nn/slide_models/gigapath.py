"""Prov-GigaPath's slide encoder (Xu et al., Nature 2024) with the linear head of its fine-tuning.

The head reads the class token (or the mean of the tiles) after each of the selected layers, where layer 0 is the
embedding; these vectors are normalised and concatenated. Every tile attends to every other. GigaPath's LongNet attends
in dilated segments instead, so outputs differ on slides with more tiles than its first segment holds, 1,024.

The head's attention is the class token's row in the last selected layer.

Dimension key: T tiles, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskattn.nn.blocks import Block
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.pools import mean_of_grid
from maskattn.nn.slide_models.attention_rows import rolled_out
from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.vit import first_row, tokens_on_grid
from maskattn.nn.vit import VisionTransformer

__all__ = ["GigaPathHead"]


class GigaPathHead(SlideHead):
    """GigaPath's slide encoder and a linear head over the outputs of selected layers.

    Args:
        vit: the result of :func:`maskattn.nn.from_gigapath`, or the arguments that rebuild it.
        num_classes: K.
        layers: numbers of the selected layers, GigaPath's ``feat_layer``; 0 is the input of the first block.
        impl: implementation of the attention if ``vit`` is a dict of arguments; None takes the best.

    Raises:
        ValueError: there is no such layer.
    """

    kind: ClassVar[str] = "gigapath"
    has_layers = True
    reads_grid = True
    reads_divided_tiles = True

    def __init__(
        self,
        vit: VisionTransformer | dict[str, Any],
        num_classes: int,
        layers: Sequence[int] = (11,),
        impl: str | None = None,
    ) -> None:
        if isinstance(vit, dict):
            vit = VisionTransformer(**{**vit, "impl": impl})
            vit.fc_norm = nn.LayerNorm(vit.embed_dim, eps=1e-6)
        super().__init__(vit.patch_embed.in_chans, num_classes)
        depth = len(vit.blocks)
        if not layers or not all(0 <= layer <= depth for layer in layers):
            raise ValueError(f"layers must be numbers from 0 to {depth}, the encoder's depth, got {list(layers)}")
        self.layers = tuple(layers)
        self.vit = vit
        self.classifier = nn.Sequential(nn.Linear(len(self.layers) * vit.embed_dim, num_classes))

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        vit = {name: value for name, value in self.vit.arguments.items() if name != "impl"}
        return {"vit": vit, "num_classes": self.num_classes, "layers": list(self.layers)}

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        tokens = tokens_on_grid(self.vit, embeddings_TC, grid)[0]
        pooled = {0: self._pooled(tokens)}
        for number in range(1, max(self.layers) + 1):
            tokens = self.vit.run_blocks(tokens, slice(number - 1, number))
            pooled[number] = self._pooled(tokens)
        logits: Tensor = self.classifier(torch.cat([pooled[layer] for layer in self.layers]))
        return logits

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        last = max(self.layers)
        if self.vit.global_pool != "token" or not last:
            return None
        tokens, order_T = tokens_on_grid(self.vit, embeddings_TC, grid)
        tokens, block = self.vit.run_blocks(tokens, slice(last - 1)), self.vit.blocks[last - 1]
        assert isinstance(block, Block), "a transformer is made of blocks"
        rows_AT = block.read_weights(tokens)[:, tokens.own_prefix :]
        return torch.empty_like(rows_AT).index_copy_(1, order_T, rows_AT)

    def rollout(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        if not max(self.layers):
            return None
        tokens, order_T = tokens_on_grid(self.vit, embeddings_TC, grid)
        row_N = first_row(tokens, self.vit.global_pool == "token")
        row_T = rolled_out(self.vit, tokens, row_N, max(self.layers))[tokens.num_prefix :]
        return torch.empty_like(row_T).index_copy_(0, order_T, row_T)

    def _pooled(self, tokens: PackedTokens) -> Tensor:
        mean = self.vit.global_pool == "avg"
        of_layer: Tensor = self.vit.fc_norm(mean_of_grid(tokens)[0] if mean else tokens.first()[0, 0])
        return of_layer

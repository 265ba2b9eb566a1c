"""Slide encoders: transformers over the embeddings of a slide's tiles, by the layout of their checkpoints.

Two kinds of position: absolute 2-D sines (Prov-GigaPath, Xu et al., Nature 2024) and 2-D ALiBi (TITAN, Ding et al.,
arXiv 2411.19666), whose biases the kernels compute from the tiles' coordinates, so that no N × N matrix exists. Every
tile attends to every other: where GigaPath's LongNet attends in dilated segments, outputs differ.

Dimension key: T tiles, C channels of their embeddings, H·W cells of the slide's grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskattn.nn.adapters.conversion import refuse
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.checkpoints import from_state_dict
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import Packing
from maskattn.shapes import Float

__all__ = ["encode_placed_tiles", "from_gigapath", "from_titan", "place_tiles"]

# torchscale's names in Prov-GigaPath's encoder, and ours.
_GIGAPATH = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"blocks.\1.norm1."),
        (r"^encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
        (r"^encoder\.layers\.(\d+)\.self_attn\.inner_attn_ln\.", r"blocks.\1.attn.norm."),
        (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
        (r"^encoder\.layers\.(\d+)\.final_layer_norm\.", r"blocks.\1.norm2."),
        (r"^encoder\.layers\.(\d+)\.ffn\.ffn_layernorm\.", r"blocks.\1.mlp.norm."),
        (r"^encoder\.layers\.(\d+)\.ffn\.", r"blocks.\1.mlp."),
        (r"^norm\.", "fc_norm."),
        (r"^encoder\.layer_norm\.", "norm."),
    )
]
# TITAN's pooling for captions, after the encoder.
_TITAN_LEFT_OUT = re.compile(r"(?:^|\.)(?:attn_pool|attn_pool_contrastive)\.|(?:^|\.)proj$")


def from_gigapath(
    checkpoint: Mapping[str, Any], *, num_heads: int = 16, global_pool: str = "token", impl: str | None = None
) -> VisionTransformer:
    """Prov-GigaPath's slide encoder, with full attention instead of dilated.

    Args:
        checkpoint: its state dict, or a dict that holds it.
        num_heads: 16 in the published encoder.
        global_pool: "token", or "avg" for its ``global_pool=True``.
        impl: implementation of the attention; None takes the best.

    Returns:
        An encoder of tile embeddings (patch_size 1, sines of the tiles' cells), normalised before and after pooling;
        run it with :func:`encode_placed_tiles`.

    Raises:
        UnsupportedModelError: a ValueError that names the keys that have no place.
    """
    state = dict(checkpoint.get("model", checkpoint))
    state.pop("pos_embed", None)  # a table of sines
    renamed: dict[str, Tensor] = {}
    for key, x in state.items():
        for pattern, ours in _GIGAPATH:
            key, found = pattern.subn(ours, key)
            if found:
                break
        renamed[key] = x
    for key in [key for key in renamed if re.search(r"attn\.q\.(weight|bias)$", key)]:
        parts = [renamed.pop(key.replace("attn.q.", f"attn.{part}.")) for part in "qkv"]
        renamed[key.replace("attn.q.", "attn.qkv.")] = torch.cat(parts)
    if "fc_norm.weight" not in renamed or "fc_norm.bias" not in renamed:
        refuse("GigaPath's slide encoder", ["it has no norm"])
    after_pool = {part: renamed.pop(f"fc_norm.{part}") for part in ("weight", "bias")}
    model = from_state_dict(
        renamed,
        num_heads=num_heads,
        name="GigaPath's slide encoder",
        impl=impl,
        pos_embed="sine",
        norm_eps=1e-5,
        global_pool=global_pool,
        fc_norm=False,
    )
    weight = after_pool["weight"]
    # Its own norm has timm's ε, those of torchscale's layers their own.
    model.fc_norm = nn.LayerNorm(len(weight), eps=1e-6, device=weight.device, dtype=weight.dtype)
    model.fc_norm.load_state_dict(after_pool)
    return model


def from_titan(checkpoint: Mapping[str, Any], *, num_heads: int = 12, impl: str | None = None) -> VisionTransformer:
    """TITAN's vision encoder: tile embeddings, class token, 2-D ALiBi.

    The attention pooling and projection after it, which align it with text, are left out: the output is the class
    token after the last norm.

    Args:
        checkpoint: its state dict, with or without the ``vision_encoder.`` prefix.
        num_heads: 12 in the published encoder.
        impl: implementation of the attention; None takes the best.

    Raises:
        UnsupportedModelError: a ValueError that names the keys that have no place.
    """
    # TITAN keeps its blocks in a list of a module.
    state = {
        key.replace("blocks.modules_list.", "blocks."): x
        for key, x in checkpoint.items()
        if not _TITAN_LEFT_OUT.search(key)
    }
    return from_state_dict(state, num_heads=num_heads, name="TITAN's encoder", impl=impl, pos_embed="alibi")


def place_tiles(
    embeddings_TC: Float[Tensor, "T C"], coords_T2: Tensor, tile_size: float
) -> tuple[Float[Tensor, "T C"], Packing, tuple[int, int]]:
    """Lay tiles out on the slide's grid, row by row.

    Args:
        embeddings_TC: (T, C), in any order.
        coords_T2: (T, 2), x and y of each tile's upper left corner, not negative, on any level.
        tile_size: side of a tile on that level.

    Returns:
        The embeddings in the grid's order, their packing in (1, H·W), and (H, W).

    Raises:
        ValueError: shapes do not fit, a coordinate is negative, or two tiles lie in one cell.
    """
    if coords_T2.shape != (len(embeddings_TC), 2) or len(embeddings_TC) == 0 or (coords_T2 < 0).any():
        raise ValueError(
            f"coords must be (T, 2) x and y ≥ 0 of T ≥ 1 tiles, got coords.shape={tuple(coords_T2.shape)} for "
            f"{len(embeddings_TC)} embeddings"
        )
    cell = torch.div(coords_T2.to(embeddings_TC.device), tile_size, rounding_mode="floor").long()
    column, row = cell.unbind(1)
    grid_HW = int(row.max()) + 1, int(column.max()) + 1
    place, order = (row * grid_HW[1] + column).sort()
    if (place.diff() == 0).any():
        raise ValueError(
            f"every tile must have a cell of its own, and {int((place.diff() == 0).sum())} share one with tile_size="
            f"{tile_size}; is it the tiles' side on the coordinates' level?"
        )
    total = len(place)
    starts = torch.tensor([0, total], dtype=torch.int32, device=place.device)
    return embeddings_TC[order], Packing(place, starts, total, 1, grid_HW[0] * grid_HW[1]), grid_HW


def encode_placed_tiles(
    encoder: VisionTransformer, embeddings_TC: Float[Tensor, "T C"], coords_T2: Tensor, tile_size: float
) -> Float[Tensor, "K"]:
    """A slide's embedding (or logits) from its tiles' embeddings and coordinates.

    Args:
        encoder: a slide encoder: patch_size 1, in_chans C.
        embeddings_TC, coords_T2, tile_size: as :func:`place_tiles` takes them.

    Example:
        >>> encoder = VisionTransformer(img_size=1, patch_size=1, in_chans=32, embed_dim=24, depth=2, num_heads=3,
        ...                             pos_embed="alibi")
        >>> encode_placed_tiles(encoder, torch.randn(3, 32), torch.tensor([[0, 0], [256, 0], [0, 512]]), 256).shape
        torch.Size([24])
    """
    return encoder(placed_tokens(encoder, embeddings_TC, coords_T2, tile_size))[0]


def placed_tokens(
    encoder: VisionTransformer, embeddings_TC: Float[Tensor, "T C"], coords_T2: Tensor, tile_size: float
) -> PackedTokens:
    """The packed tokens with which the encoder starts. Arguments as in :func:`encode_placed_tiles`."""
    rows_TC, packing, grid_HW = place_tiles(embeddings_TC, coords_T2, tile_size)
    return encoder.embed_patches(rows_TC, packing, grid_HW)

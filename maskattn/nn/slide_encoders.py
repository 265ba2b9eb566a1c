"""Slide encoders: transformers over the embeddings of a slide's tiles, loaded from published checkpoints.

Positions are absolute 2-D sines (Prov-GigaPath, Xu et al., Nature 2024) or 2-D ALiBi (TITAN, Ding et al., arXiv
2411.19666), whose biases the kernels compute from the tiles' coordinates, without an N × N matrix. Every tile attends
to every other; GigaPath's LongNet attends in dilated segments, so its outputs differ.

Dimension key: T tiles, C channels of their embeddings, H·W cells of the slide's grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maskattn.distributed.agreement import agree
from maskattn.distributed.transport import gather_numbers
from maskattn.nn.adapters.conversion import refuse
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.checkpoints import from_state_dict
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import Packing
from maskattn.shapes import Float

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["encode_placed_tiles", "from_gigapath", "from_titan", "place_tiles"]

# torchscale's names in Prov-GigaPath's encoder, and the names here.
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
# TITAN's pooling after the encoder, which aligns it with captions.
_TITAN_LEFT_OUT = re.compile(r"(?:^|\.)(?:attn_pool|attn_pool_contrastive)\.|(?:^|\.)proj$")


def from_gigapath(
    checkpoint: Mapping[str, Any], *, num_heads: int = 16, global_pool: str = "token", impl: str | None = None
) -> VisionTransformer:
    """Build Prov-GigaPath's slide encoder, with full instead of dilated attention.

    Args:
        checkpoint: the encoder's state dict, or a dict that holds it.
        num_heads: the number of heads, 16 in the published encoder.
        global_pool: "token", or "avg" for GigaPath's ``global_pool=True``.
        impl: the implementation of attention; None takes the best.

    Returns:
        An encoder of tile embeddings (patch_size 1, sine positions of the tiles' cells), normalised before and after
        pooling; run it with :func:`encode_placed_tiles`.

    Raises:
        UnsupportedModelError: a ValueError that names the unexpected and missing keys.
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
        qkv = [renamed.pop(key.replace("attn.q.", f"attn.{name}.")) for name in "qkv"]
        renamed[key.replace("attn.q.", "attn.qkv.")] = torch.cat(qkv)
    if "fc_norm.weight" not in renamed or "fc_norm.bias" not in renamed:
        refuse("GigaPath's slide encoder", ["it has no norm"])
    after_pool = {name: renamed.pop(f"fc_norm.{name}") for name in ("weight", "bias")}
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
    # GigaPath builds this norm itself, with another ε than those in torchscale's layers.
    model.fc_norm = nn.LayerNorm(len(weight), eps=1e-6, device=weight.device, dtype=weight.dtype)
    model.fc_norm.load_state_dict(after_pool)
    return model


def from_titan(checkpoint: Mapping[str, Any], *, num_heads: int = 12, impl: str | None = None) -> VisionTransformer:
    """Build TITAN's vision encoder: tile embeddings, class token, 2-D ALiBi.

    The attention pooling and the projection that align it with text are left out: the output is the class token after
    the last norm.

    Args:
        checkpoint: the encoder's state dict, with or without the ``vision_encoder.`` prefix.
        num_heads: the number of heads, 12 in the published encoder.
        impl: the implementation of attention; None takes the best.

    Raises:
        UnsupportedModelError: a ValueError that names the unexpected and missing keys.
    """
    # TITAN keeps its blocks in a list of a module.
    state = {
        key.replace("blocks.modules_list.", "blocks."): x
        for key, x in checkpoint.items()
        if not _TITAN_LEFT_OUT.search(key)
    }
    return from_state_dict(state, num_heads=num_heads, name="TITAN's encoder", impl=impl, pos_embed="alibi")


def place_tiles(
    embeddings_TC: Float[Tensor, "T C"], coords_T2: Tensor, tile_size: float, group: ProcessGroup | None = None
) -> tuple[Float[Tensor, "T C"], Packing, tuple[int, int]]:
    """Place tiles on the slide's grid, row by row.

    Args:
        embeddings_TC: (T, C), in any order.
        coords_T2: (T, 2), x and y ≥ 0 of each tile's upper left corner, in px of any level.
        tile_size: the side of a tile, in px of the same level.
        group: as in :func:`encode_placed_tiles`.

    Returns:
        The embeddings in the grid's order, their packing in (1, H·W), and (H, W), the same in all processes of a group.

    Raises:
        ValueError: shapes do not fit, a coordinate is negative, or two tiles are in one cell.
        GroupError: another process of the group refuses its arguments, or has ended.
    """
    problem = _problem_of_places(embeddings_TC, coords_T2, tile_size, empty=group is not None)
    if group is not None:
        agree("encode_placed_tiles", {"tile_size": tile_size}, problem, group, embeddings_TC.device)
    elif problem is not None:
        raise problem
    row, column = _cells(embeddings_TC, coords_T2, tile_size)
    grid_HW = (int(row.max()) + 1, int(column.max()) + 1) if len(row) else (0, 0)
    if group is not None:
        all_HW = gather_numbers(list(grid_HW), group, embeddings_TC.device)
        grid_HW = max(H for H, _ in all_HW), max(W for _, W in all_HW)
    index, order = (row * grid_HW[1] + column).sort()
    total = len(index)
    starts = torch.tensor([0, total], dtype=torch.int32, device=index.device)
    return embeddings_TC[order], Packing(index, starts, total, 1, grid_HW[0] * grid_HW[1]), grid_HW


def _cells(embeddings_TC: Tensor, coords_T2: Tensor, tile_size: float) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each tile, (T,) int64 each."""
    column, row = torch.div(coords_T2.to(embeddings_TC.device), tile_size, rounding_mode="floor").long().unbind(1)
    return row, column


def _problem_of_places(embeddings_TC: Tensor, coords_T2: Tensor, tile_size: float, *, empty: bool) -> ValueError | None:
    """Return the error if tiles cannot be placed on a grid; ``empty``: there may be none."""
    fits = coords_T2.shape == (len(embeddings_TC), 2) and (empty or len(embeddings_TC) > 0)
    if not fits or (coords_T2 < 0).any():
        return ValueError(
            f"coords must be (T, 2) x and y ≥ 0 of T ≥ 1 tiles, got coords.shape={tuple(coords_T2.shape)} for "
            f"{len(embeddings_TC)} embeddings"
        )
    row, column = _cells(embeddings_TC, coords_T2, tile_size)
    shared = len(row) - len(torch.stack([row, column]).unique(dim=1)[0]) if len(row) else 0
    if shared:
        return ValueError(
            f"every tile must have a cell of its own, got {shared} that share one with tile_size={tile_size}; pass the "
            "tiles' side in px of the coordinates' level"
        )
    return None


def encode_placed_tiles(
    encoder: VisionTransformer,
    embeddings_TC: Float[Tensor, "T C"],
    coords_T2: Tensor,
    tile_size: float,
    group: ProcessGroup | None = None,
) -> Float[Tensor, "K"]:
    """Compute a slide's embedding (or its logits, if the encoder has a head) from tile embeddings and coordinates.

    Args:
        encoder: a slide encoder: patch_size 1, in_chans C.
        embeddings_TC: (T, C), in any order.
        coords_T2: (T, 2), x and y ≥ 0 of each tile's upper left corner, in px of any level.
        tile_size: the side of a tile, in px of the same level.
        group: the process group over which the slide's tiles are divided, T of them being this process's; None if this
            process has all tiles.

    Returns:
        (K,), the encoder's output; the same in all processes of a group.

    Raises:
        ValueError: shapes do not fit, a coordinate is negative, or two tiles are in one cell.
        GroupError: another process of the group refuses its arguments, or has ended.

    Example:
        >>> encoder = VisionTransformer(img_size=1, patch_size=1, in_chans=32, embed_dim=24, depth=2, num_heads=3,
        ...                             pos_embed="alibi")
        >>> encode_placed_tiles(encoder, torch.randn(3, 32), torch.tensor([[0, 0], [256, 0], [0, 512]]), 256).shape
        torch.Size([24])
    """
    return encoder(placed_tokens(encoder, embeddings_TC, coords_T2, tile_size, group))[0]


def placed_tokens(
    encoder: VisionTransformer,
    embeddings_TC: Float[Tensor, "T C"],
    coords_T2: Tensor,
    tile_size: float,
    group: ProcessGroup | None = None,
) -> PackedTokens:
    """Embed tiles as packed tokens for the encoder's blocks. Arguments as in :func:`encode_placed_tiles`."""
    rows_TC, packing, grid_HW = place_tiles(embeddings_TC, coords_T2, tile_size, group)
    return encoder.embed_patches(rows_TC, packing, grid_HW, group)

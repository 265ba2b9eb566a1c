"""Whole transformer blocks in inference by the C++ kernels: norms, projections, attention, MLP and residuals.

A block is computed in three passes: norm and q, k, v of a few rows at a time; attention; the rest for a few rows at a
time, so that the hidden features of the MLP never leave a core's cache. A sequence's result does not depend on those
beside it.

Dimension key: T packed tokens, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from maskattn.attention.impl import cpu
from maskattn.extension import argument_of, extension
from maskattn.nn.inference_linear import GELUS, computed_in, kept_or_packed, multiplies_natively
from maskattn.nn.mlps import Mlp
from maskattn.nn.native_layers import argument_or_none, can_pack, pack_layer, rows_in
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.plain_modules import has_plain_parameters
from maskattn.shapes import Float

if TYPE_CHECKING:
    from maskattn.nn.blocks import Block

__all__ = ["apply_whole"]


def apply_whole(block: Block, rows_TC: Float[Tensor, "T C"], tokens: PackedTokens) -> Float[Tensor, "T C"] | None:
    """Compute a block that is as it was built, (T, C) → (T, C); norms, sums and residuals are float32.

    Args:
        block: the block.
        rows_TC: its input.
        tokens: the layout of the rows; its own rows are not read.

    Returns:
        Its output in the dtype that its layers would give it; None if the kernels do not compute it, or not here.
    """
    dtype = multiplies_natively(rows_TC, tokens)
    if dtype is None or not _takes(block, tokens):
        return None
    layers = _layers(block)
    if not all(can_pack(layer.in_features, computed_in(dtype)) for layer in layers):
        return None
    weights = [layer.weight for layer in layers]
    packed = kept_or_packed(block, dtype, weights, len(rows_TC), lambda: _pack(block, dtype))
    if packed is None:
        return None
    x = rows_in(torch.float32, rows_TC)
    out = torch.empty_like(x)
    starts = tokens.packing.cu_seqlens.contiguous()
    packed.apply(argument_of(x), argument_of(starts), argument_of(out), threads=torch.get_num_threads())
    return out.to(_dtype_of_sum(block, rows_TC.dtype))


def _dtype_of_sum(block: Block, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of rows to which the block's updates are added, as LayerScale may have another than the rows."""
    for scale in (block.ls1, block.ls2):
        for gamma in scale.parameters():
            dtype = torch.promote_types(dtype, gamma.dtype)
    return dtype


def _layers(block: Block) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    mlp = cast(Mlp, block.mlp)
    return block.attn.qkv, block.attn.proj, mlp.fc1, mlp.fc2


def _takes(block: Block, tokens: PackedTokens) -> bool:
    """Return whether the kernels compute a block that is as it was built on rows of these tokens."""
    attn, mlp = block.attn, block.mlp
    if tokens.shards is not None or tokens.coords_T2 is not None or tokens.rotation is not None:
        return False
    if type(mlp) is not Mlp or mlp.act not in GELUS or attn.impl not in (None, "cpu"):
        return False
    if attn.qkv.in_features // attn.num_heads not in cpu.HEAD_WIDTHS or _drops(block):
        return False
    if any(type(norm) is not nn.Identity for norm in (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)):
        return False
    return all(has_plain_parameters(layer) for layer in (*_layers(block), block.norm1, block.norm2))


def _pack(block: Block, dtype: torch.dtype) -> Any:
    """Pack the weights of a block, rounded to ``dtype``."""

    def packed(layer: nn.Linear) -> Any:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return pack_layer(layer.weight.to(dtype), bias, computed_in(dtype))

    qkv, proj, fc1, fc2 = map(packed, _layers(block))
    norm1, norm2 = block.norm1, block.norm2
    return extension().EncoderBlock(
        norm1_weight=argument_or_none(norm1.weight),
        norm1_bias=argument_or_none(norm1.bias),
        norm1_eps=norm1.eps,
        qkv=qkv,
        proj=proj,
        scale1=argument_or_none(getattr(block.ls1, "gamma", None)),
        norm2_weight=argument_or_none(norm2.weight),
        norm2_bias=argument_or_none(norm2.bias),
        norm2_eps=norm2.eps,
        fc1=fc1,
        fc2=fc2,
        scale2=argument_or_none(getattr(block.ls2, "gamma", None)),
        heads=block.attn.num_heads,
        activation=cast(Mlp, block.mlp).act,
    )


def _drops(block: Block) -> bool:
    """Return whether something is dropped at random; parts of a block may be in training mode by themselves."""
    paths = [path.share for path in (block.drop_path1, block.drop_path2) if path.training]
    features = [drop.p for drop in (block.attn.proj_drop, cast(Mlp, block.mlp).drop) if drop.training]
    return max((block.attn.dropout_p, *paths, *features)) > 0

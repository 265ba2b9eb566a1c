"""Forward-mode derivatives of the attention operations, in eager torch for every implementation.

With ṡ the tangent of a score and m the dropout factors, the tangent of attention is

    ṡ_ij = s (q̇_i·k_j + q_i·k̇_j) + ḃ_j − ȧ ‖x_i − x_j‖     lsė_i = Σ_j p_ij ṡ_ij     ṗ_ij = p_ij (ṡ_ij − lsė_i)

    ouṫ_i = Σ_j m_ij (ṗ_ij v_j + p_ij v̇_j)

They are computed for a bounded number of queries at a time, as in ``blocks.py``; no N×N array is held.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskattn.attention.impl.torch.blocks import blocks_of_queries
from maskattn.attention.impl.torch.dense import DensePacking, gather
from maskattn.attention.impl.torch.scores import as_packed, wide_dtype
from maskattn.operands import QKV, KeySequences, Mask, Sequences
from maskattn.options import Options
from maskattn.results import Tangents

__all__ = ["masked_tangent", "packed_tangent", "readout_tangent"]


def packed_tangent(qkv: QKV, where: Sequences, options: Options, tangents: Tangents) -> tuple[Tensor, Tensor]:
    """The tangents of out (Tq, H, D) and lse (H, Tq)."""
    out, lse, _ = _push(qkv, where, options, tangents)
    return out, lse


def masked_tangent(qkv: QKV, where: Mask, options: Options, tangents: Tangents) -> tuple[Tensor, Tensor]:
    """The tangents of out (B, H, Nq, D) and lse (B, H, Nq), 0 at background positions."""
    packing, shape = DensePacking.of(qkv.q, where), tuple(qkv.q.shape)
    of_tokens = {"q": packing.queries, "k": packing.keys, "v": packing.keys}
    moved = {name: gather(x, each) for name, each in of_tokens.items() if (x := getattr(tangents, name)) is not None}
    own = replace(tangents, **moved, key_bias=packing.packed_bias(tangents.key_bias))
    out, lse, _ = _push(packing.packed(qkv), packing.sequences, packing.packed_options(options), own)
    lse_BHN = packing.dense_lse(lse, shape)
    return packing.dense_out(out, shape), lse_BHN.masked_fill(lse_BHN.isinf(), 0)


def readout_tangent(
    qkv: QKV, where: KeySequences, options: Options, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of out (B, R, H, D), lse (B, R, H) and rows (R, H, T)."""
    B, R, H, _ = qkv.q.shape
    own = replace(tangents, q=None if tangents.q is None else tangents.q.flatten(0, 1))
    rows = torch.zeros((R, H, qkv.k.shape[0]), dtype=wide_dtype(qkv.q), device=qkv.q.device)
    out, lse, rows = _push(*as_packed(qkv, where, options), own, rows)
    return out.view(qkv.q.shape), lse.view(H, B, R).permute(1, 2, 0).contiguous(), rows


def _push(
    qkv: QKV, where: Sequences, options: Options, tangents: Tangents, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of out and lse of packed tokens, and of the weights of R queries per sequence if ``rows`` is given."""
    q, k, v = qkv.q, qkv.k, qkv.v
    wide, s = wide_dtype(q), options.scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=wide)
    rows = q.new_empty(0) if rows is None else rows
    for block in blocks_of_queries(qkv, where, options):
        queries, keys = block.queries, block.keys
        score = torch.zeros_like(block.p_HQK)
        for a, b in ((tangents.q, k), (q, tangents.k)):
            if a is not None and b is not None:
                score += s * torch.einsum("qhd,khd->hqk", a[queries].to(wide), b[keys].to(wide))
        score = block.derivatives.along_product(score)
        if tangents.key_bias is not None:
            bias = tangents.key_bias[keys].to(wide)
            score += (bias[None] if bias.ndim == 1 else bias.T)[:, None, :]
        if tangents.slopes is not None and block.derivatives.distance_QK is not None:
            score -= tangents.slopes[:, None, None].to(wide) * block.derivatives.distance_QK
        # The tangent of a score may be infinite or NaN where p is 0.
        score = score.masked_fill(block.p_HQK == 0, 0)
        lse[:, queries] = (block.p_HQK * score).sum(dim=-1)
        p = block.p_HQK * (score - lse[:, queries, None])
        out_QHD = torch.einsum("hqk,khd->qhd", block.dropped(p), v[keys].to(wide))
        if tangents.v is not None:
            out_QHD += torch.einsum("hqk,khd->qhd", block.dropped(block.p_HQK), tangents.v[keys].to(wide))
        out[queries] = out_QHD.to(q.dtype)
        if rows.numel() > 0:
            rows[block.within(rows.shape[0]), :, keys] = p.transpose(0, 1)
    return out, lse, rows

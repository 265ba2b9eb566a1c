"""Forward-mode derivatives of the attention operations, in eager torch whatever the implementation.

With ṡ the tangent of a score and m the dropout factors, the tangent of attention is

    ṡ_ij = s (q̇_i·k_j + q_i·k̇_j) + ḃ_j − ȧ ‖x_i − x_j‖     lsė_i = Σ_j p_ij ṡ_ij     ṗ_ij = p_ij (ṡ_ij − lsė_i)

    ouṫ_i = Σ_j m_ij (ṗ_ij v_j + p_ij v̇_j)

A bounded number of queries at a time, as ``torch_blocks`` has it; nothing of size N×N is held. Each is an operation of
its own, so that ``torch.func`` maps over it; its own derivative is refused.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskattn.attention.dense import DenseRows, gather
from maskattn.attention.torch_blocks import blocks_of_queries, options_as_packed, wide_dtype
from maskattn.options import Options, Sequences
from maskattn.transforms import refuse

__all__ = ["Moved", "masked_tangent", "no_second_derivative", "packed_tangent", "readout_tangent", "refuse_places"]


class Moved(NamedTuple):
    """Tangents of an operation's inputs, shaped as these are; None for what does not move."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    key_bias: Tensor | None
    slopes: Tensor | None


def no_second_derivative(operation: str) -> Any:
    """What a derivative's own derivative is: a refusal that says what to do instead."""

    def raise_it(*_: Any) -> Any:
        raise NotImplementedError(
            f"{operation} has no second derivative (a backward with create_graph=True, or a transform of torch.func, "
            "was differentiated); use the functions of maskattn.attention.reference, which torch differentiates any "
            "number of times"
        )

    return raise_it


def refuse_places(*asked: bool) -> None:
    """Places have no derivative, forward or backward; ``asked`` says whether one is."""
    if any(asked):
        raise NotImplementedError(
            "coords have no derivative, got one asked for by torch.func or forward-mode AD; compute them from what has "
            "none, or use the functions of maskattn.attention.reference"
        )


def _packed_tangent(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Of out (Tq, H, D) and lse (H, Tq); ``rest`` is the options and what moved."""
    out, lse, _ = _push(q, k, v, Sequences(cu_q, cu_k, max_q, max_k), Options(*rest[:7]), Moved(*rest[7:]))
    return out, lse


def _masked_tangent(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Of out (B, H, Nq, D) and lse (B, H, Nq), 0 at background positions."""
    options, moved = Options(*rest[:7]), Moved(*rest[7:])
    rows = DenseRows.of(q, keep, skip_queries)
    side = {"q": rows.queries, "k": rows.keys, "v": rows.keys}
    packed = {name: gather(x, side[name]) for name, x in (("q", q), ("k", k), ("v", v))}
    own = {name: gather(x, side[name]) for name in side if (x := getattr(moved, name)) is not None}
    bias = rows.packed_options(Options(1.0, moved.key_bias)).key_bias
    packed_moved = Moved(own.get("q"), own.get("k"), own.get("v"), bias, moved.slopes)
    out, lse, _ = _push(**packed, sequences=rows.sequences, options=rows.packed_options(options), moved=packed_moved)
    lse_BHN = rows.dense_lse(lse, tuple(q.shape))
    return rows.dense_out(out, tuple(q.shape)), lse_BHN.masked_fill(lse_BHN.isinf(), 0)


def _readout_tangent(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of out (B, R, H, D), lse (B, R, H) and rows (R, H, T)."""
    options, moved = Options(*rest[:7]), Moved(*rest[7:])
    B, R, H, _ = q.shape
    sequences, own = options_as_packed(q, cu_seqlens, max_seqlen, options)
    flat_moved = moved._replace(q=None if moved.q is None else moved.q.flatten(0, 1))
    rows = torch.zeros((R, H, k.shape[0]), dtype=wide_dtype(q), device=q.device)
    out, lse, rows = _push(q.flatten(0, 1), k, v, sequences, own, flat_moved, rows)
    return out.view(q.shape), lse.view(H, B, R).permute(1, 2, 0).contiguous(), rows


def _push(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    options: Options,
    moved: Moved,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of out and lse of packed rows, and of the weights of R queries a sequence where ``rows`` is given."""
    wide, s = wide_dtype(q), options.scale
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=wide)
    rows = q.new_empty(0) if rows is None else rows
    for block in blocks_of_queries(q, k, sequences, options):
        mine, keys = block.queries, block.keys
        score = torch.zeros_like(block.p_HQK)
        for a, b in ((moved.q, k), (q, moved.k)):
            if a is not None and b is not None:
                score += s * torch.einsum("qhd,khd->hqk", a[mine].to(wide), b[keys].to(wide))
        if moved.key_bias is not None:
            bias = moved.key_bias[keys].to(wide)
            score += (bias[None] if bias.ndim == 1 else bias.T)[:, None, :]
        if moved.slopes is not None and block.distance_QK is not None:
            score -= moved.slopes[:, None, None].to(wide) * block.distance_QK
        # Where p is 0 the score may move without bound.
        score = score.masked_fill(block.p_HQK == 0, 0)
        lse[:, mine] = (block.p_HQK * score).sum(dim=-1)
        p = block.p_HQK * (score - lse[:, mine, None])
        out_QHD = torch.einsum("hqk,khd->qhd", block.dropped(p), v[keys].to(wide))
        if moved.v is not None:
            out_QHD += torch.einsum("hqk,khd->qhd", block.dropped(block.p_HQK), moved.v[keys].to(wide))
        out[mine] = out_QHD.to(q.dtype)
        if rows.numel() > 0:
            rows[block.within(rows.shape[0]), :, keys] = p.transpose(0, 1)
    return out, lse, rows


packed_tangent = refuse(_packed_tangent, no_second_derivative("packed_attention"), always=True)
masked_tangent = refuse(_masked_tangent, no_second_derivative("masked_attention"), always=True)
readout_tangent = refuse(_readout_tangent, no_second_derivative("readout"), always=True)

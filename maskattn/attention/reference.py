"""The specification of the attention operations: eager torch, any dtype and device, differentiable by autograd.

For query i and key j of one sequence and head, with scale s, key bias b, slope a and positions x (2-D ALiBi), and
dropout factors m, which are 0 or 1/(1 − dropout_p):

    score_ij = s · q_i·k_j + b_j − a·‖x_i − x_j‖      p_ij = exp(score_ij − lse_i)      out_i = Σ_j m_ij p_ij v_j

    lse_i = log Σ_j exp(score_ij)

A token without a position (a row of NaN: class token, register) has distance 0 from all tokens. A query without keys,
or whose keys all have a bias of −inf, gives out = 0, lse = −inf and gradient 0. Any finite bias is valid, up to the
largest and smallest of its dtype: keys of equal scores have equal weights, and lse is the number nearest to the true
one (±finfo.max if all scores of a row are). A bias of +inf or NaN on a key that takes part gives NaN in out, lse and
gradients of every query that sees the key. Every other implementation is tested against these functions in float64.
They may hold an N×N matrix; nothing else in the package does.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head width,
K classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskattn.dropout import dropout_factors
from maskattn.options import Options

__all__ = ["OPTIONS", "packed_attention", "masked_attention", "readout", "token_relevance", "distances"]

OPTIONS = frozenset(
    {
        "scale",
        "key_bias",
        "slopes",
        "coords_q",
        "coords_k",
        "dropout_p",
        "dropout_seed",
        "precision",
        "deterministic",
        "query_offsets",
        "key_offsets",
    }
)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences, one sequence at a time.

    Args:
        q: (Tq, H, D).
        k, v: (Tk, H, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) ints; sequence b has query rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        options: the options, in the shapes for packed tensors.

    Returns:
        out (Tq, H, D) and lse (H, Tq).
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        own = _rows_of_options(options, queries, keys)
        out, lse, _ = _attend_one_sequence(q[queries], k[keys], v[keys], b, own)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, options: Options
) -> tuple[Tensor, Tensor]:
    """Dense attention with a softmax over the kept keys only.

    Args:
        q: (B, H, Nq, D).
        k, v: (B, H, N, D).
        keep: (B, N) bool, True = the token takes part.
        skip_queries: background queries give 0 (then Nq = N); otherwise every query attends to the kept keys.
        options: the options, in the shapes for dense tensors.

    Returns:
        out (B, H, Nq, D) and lse (B, H, Nq).
    """
    # Background rows are set to 0: 0 · NaN would spoil sums over the keys, and autograd through them.
    keep_B1N1 = keep[:, None, :, None]
    k, v = k.masked_fill(~keep_B1N1, 0), v.masked_fill(~keep_B1N1, 0)
    if skip_queries:
        q = q.masked_fill(~keep_B1N1, 0)
    options = _without_background(options, keep, skip_queries)
    scores = options.scale * (q @ k.transpose(-1, -2))  # [B, H, Nq, N]
    key_bias = options.key_bias
    if key_bias is not None:
        bias_BHN = key_bias[:, None, :] if key_bias.ndim == 2 else key_bias
        scores = scores + bias_BHN[:, :, None, :].to(scores.dtype)
    if options.slopes is not None and options.coords_q is not None and options.coords_k is not None:
        distance_BQK = distances(options.coords_q, options.coords_k)
        scores = scores - options.slopes[:, None, None].to(scores.dtype) * distance_BQK[:, None].to(scores.dtype)
    takes_part = keep[:, None, None, :].expand_as(scores)
    if skip_queries:
        takes_part = takes_part & keep[:, None, :, None]
    probabilities, lse = _softmax_or_zero(scores, takes_part)
    if options.dropout_seed is not None:
        position_BN = keep.cumsum(1) - keep.long()
        everyone = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        factors = dropout_factors(
            options.dropout_seed,
            options.dropout_p,
            (position_BN if skip_queries else everyone)[:, None, :, None],
            position_BN[:, None, None, :],
            torch.arange(q.shape[1], device=q.device)[None, :, None, None],
            torch.arange(q.shape[0], device=q.device)[:, None, None, None],
        )
        probabilities = probabilities * factors.to(probabilities.dtype)
    return probabilities @ v, lse


def readout(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of R queries of each sequence over its packed keys, with the attention rows.

    Args:
        q: (B, R, H, D).
        k, v: (T, H, D).
        cu_seqlens: (B + 1,) ints, the key sequences.
        options: the options, in the shapes for packed tensors; coords_q is (B, R, 2).

    Returns:
        out (B, R, H, D), lse (B, R, H) and rows (R, H, T): rows[r, h, t] is the softmax weight of token t in row r of
        t's sequence, before dropout.
    """
    starts = cu_seqlens.tolist()
    outs, lses, rows = [], [], []
    for b in range(q.shape[0]):
        keys = slice(starts[b], starts[b + 1])
        out, lse, probabilities = _attend_one_sequence(q[b], k[keys], v[keys], b, _rows_of_options(options, b, keys))
        outs.append(out)
        lses.append(lse.T)
        rows.append(probabilities.transpose(0, 1))
    return torch.stack(outs), torch.stack(lses), torch.cat(rows, dim=2)


def token_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    key_origin: Tensor | None,
    value_origin: Tensor | None,
    cu_seqlens: Tensor,
    options: Options,
) -> Tensor:
    """Directional derivative of every class's score along every token, for scores that depend only on a readout.

    With k̇ = k − key_origin and v̇ = v − value_origin the derivatives of key and value, o the readout and g_c = ∂f_c/∂o:

        S_ct = Σ_r Σ_h p_rht · [ v̇_th·g_crh + ((v_th − o_rh)·g_crh) · s (k̇_th·q_rh) ]

    Args:
        q: (B, R, H, D).
        k, v: (T, H, D).
        grad_out: (K, B, R, H, D), the g of each class.
        key_origin, value_origin: (H, D) or (T, H, D), or None for 0. For affine k and v they are the biases.
        cu_seqlens: (B + 1,) ints, the key sequences.
        options: the options, in the shapes for packed tensors, without dropout; coords_q is (B, R, 2).

    Returns:
        S (K, T), in the order of the classes.

    Source: the closed form of Brocki, Binda, Chung, arXiv 2312.02364, equation for S.
    """
    key_origin, value_origin = (
        x.new_zeros(()) if origin is None else origin for x, origin in ((k, key_origin), (v, value_origin))
    )
    moved_k, moved_v = k - key_origin, v - value_origin
    out, _, rows = readout(q, k, v, cu_seqlens, options)
    starts = cu_seqlens.tolist()
    relevance = []
    for b in range(q.shape[0]):
        keys = slice(starts[b], starts[b + 1])
        weights_RHT, g_KRHD = rows[:, :, keys], grad_out[:, b]
        score_change = options.scale * torch.einsum("thd,rhd->rht", moved_k[keys], q[b])
        from_value = torch.einsum("thd,crhd->crht", moved_v[keys], g_KRHD)
        from_score = torch.einsum("thd,crhd->crht", v[keys], g_KRHD) - (out[b] * g_KRHD).sum(-1)[..., None]
        relevance.append((weights_RHT * (from_value + from_score * score_change)).sum((1, 2)))
    return torch.cat(relevance, dim=1)


def distances(positions_q: Tensor, positions_k: Tensor) -> Tensor:
    """Distances of positions, (..., Lq, 2) and (..., Lk, 2) → (..., Lq, Lk), in float32 or wider.

    They are 0 for tokens without a position.
    """
    dtype = torch.promote_types(positions_q.dtype, torch.float32)
    difference = positions_q[..., :, None, :].to(dtype) - positions_k[..., None, :, :].to(dtype)
    return difference.square().sum(-1).sqrt().nan_to_num(nan=0.0)


def _without_background(options: Options, keep: Tensor, skip_queries: bool) -> Options:
    """The options of dense tensors, with the values of background tokens set to 0."""

    def kept(x: Tensor | None, keep_shape: tuple[int, ...]) -> Tensor | None:
        return None if x is None else x.masked_fill(~keep.reshape(keep_shape), 0)

    B, N = keep.shape
    bias_shape = (B, 1, N) if options.key_bias is not None and options.key_bias.ndim == 3 else (B, N)
    return replace(
        options,
        key_bias=kept(options.key_bias, bias_shape),
        coords_q=kept(options.coords_q, (B, N, 1)) if skip_queries else options.coords_q,
        coords_k=kept(options.coords_k, (B, N, 1)),
    )


def _rows_of_options(options: Options, queries: slice | int, keys: slice) -> Options:
    """The options of one sequence."""
    bias, coords_q, coords_k = options.key_bias, options.coords_q, options.coords_k
    return replace(
        options,
        key_bias=None if bias is None else bias[keys],
        coords_q=None if coords_q is None else coords_q[queries],
        coords_k=None if coords_k is None else coords_k[keys],
    )


def _attend_one_sequence(
    q: Tensor, k: Tensor, v: Tensor, sequence: int, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(Lq, H, D), (Lk, H, D) → out (Lq, H, D), lse (H, Lq), probabilities (H, Lq, Lk) before dropout."""
    scores = options.scale * torch.einsum("qhd,khd->hqk", q, k)
    bias = options.key_bias
    if bias is not None:
        bias_HK = bias[None, :] if bias.ndim == 1 else bias.T
        scores = scores + bias_HK[:, None, :].to(scores.dtype)
    if options.slopes is not None and options.coords_q is not None and options.coords_k is not None:
        distance_QK = distances(options.coords_q, options.coords_k).to(scores.dtype)
        scores = scores - options.slopes[:, None, None].to(scores.dtype) * distance_QK
    probabilities, lse = _softmax_or_zero(scores, torch.ones_like(scores, dtype=torch.bool))
    weights = probabilities
    if options.dropout_seed is not None:
        heads, queries, keys = (torch.arange(n, device=q.device) for n in scores.shape)
        # The queries and keys of a chunk have the positions that they have in the whole sequence.
        if options.query_offsets is not None:
            queries = queries + options.query_offsets[sequence]
        if options.key_offsets is not None:
            keys = keys + options.key_offsets[sequence]
        factors = dropout_factors(
            options.dropout_seed,
            options.dropout_p,
            queries[None, :, None],
            keys[None, None, :],
            heads[:, None, None],
            torch.tensor(sequence, device=q.device),
        )
        weights = probabilities * factors.to(probabilities.dtype)
    return torch.einsum("hqk,khd->qhd", weights, v), lse, probabilities


def _softmax_or_zero(scores: Tensor, takes_part: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis where ``takes_part``; a row without any is 0 with lse −inf, its gradient 0."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    takes_part = takes_part & (scores != float("-inf"))
    empty = ~takes_part.any(dim=-1, keepdim=True)
    finite = scores.masked_fill(~takes_part, float("-inf")).masked_fill(empty, 0)
    # The largest score, a constant for autograd, is subtracted before the exponential and added to the logarithm.
    largest = finite.detach().amax(dim=-1, keepdim=True)
    lse = largest + (finite - largest).exp().sum(dim=-1, keepdim=True).log()
    probabilities = finite.softmax(dim=-1).masked_fill(~takes_part, 0)
    return probabilities, lse.masked_fill(empty, float("-inf")).squeeze(-1)

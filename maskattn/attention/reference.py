"""The specification of the attention operations: eager torch, any dtype and device, differentiable by autograd.

For query i and key j of one sequence and head, with scale s and key bias b:

    score_ij = s · q_i·k_j + b_j        p_ij = exp(score_ij − lse_i)        out_i = Σ_j p_ij v_j

    lse_i = log Σ_j exp(score_ij)

A query that has no key gives out = 0, lse = −inf and gradient 0. Every other implementation is tested against these
functions in float64. They may hold an N×N matrix; nothing else in the package does.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["packed_attention", "masked_attention", "readout"]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences, one after another.

    Args:
        q: (Tq, H, D).
        k, v: (Tk, H, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) ints; sequence b has query rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        key_bias: (Tk,) or (Tk, H), added to the scores.
        scale: s above; 1/√D if None.

    Returns:
        out (Tq, H, D) and lse (H, Tq).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        bias = None if key_bias is None else key_bias[keys]
        out, lse, _ = _attend_one_sequence(q[queries], k[keys], v[keys], bias, scale)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    skip_queries: bool = True,
) -> tuple[Tensor, Tensor]:
    """Dense attention with a softmax over the kept keys only.

    Args:
        q: (B, H, Nq, D).
        k, v: (B, H, N, D).
        keep: (B, N) bool, True = the token takes part.
        key_bias: (B, N) or (B, H, N), added to the scores.
        scale: 1/√D if None.
        skip_queries: background queries give 0 (then Nq = N); otherwise every query attends to the kept keys.

    Returns:
        out (B, H, Nq, D) and lse (B, H, Nq).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Zeros in place of background rows: 0 · NaN would poison sums over the keys, and autograd through them.
    keep_B1N1 = keep[:, None, :, None]
    k, v = k.masked_fill(~keep_B1N1, 0), v.masked_fill(~keep_B1N1, 0)
    if skip_queries:
        q = q.masked_fill(~keep_B1N1, 0)
    scores = scale * (q @ k.transpose(-1, -2))  # [B, H, Nq, N]
    if key_bias is not None:
        bias_BHN = key_bias[:, None, :] if key_bias.ndim == 2 else key_bias
        bias_BHN = bias_BHN.masked_fill(~keep[:, None, :], 0)
        scores = scores + bias_BHN[:, :, None, :].to(scores.dtype)
    takes_part = keep[:, None, None, :].expand_as(scores)
    if skip_queries:
        takes_part = takes_part & keep[:, None, :, None]
    probabilities, lse = _softmax_or_zero(scores, takes_part)
    return probabilities @ v, lse


def readout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of R queries of each sequence over its packed keys, with the attention rows.

    Args:
        q: (B, R, H, D).
        k, v: (T, H, D).
        cu_seqlens: (B + 1,) ints, the key sequences.
        key_bias: (T,) or (T, H), added to the scores.
        scale: 1/√D if None.

    Returns:
        out (B, R, H, D), lse (B, R, H) and rows (R, H, T): rows[r, h, t] is the softmax weight of token t in row r of
        the sequence to which t belongs.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = cu_seqlens.tolist()
    outs, lses, rows = [], [], []
    for b in range(q.shape[0]):
        keys = slice(starts[b], starts[b + 1])
        bias = None if key_bias is None else key_bias[keys]
        out, lse, probabilities = _attend_one_sequence(q[b], k[keys], v[keys], bias, scale)
        outs.append(out)
        lses.append(lse.T)
        rows.append(probabilities.transpose(0, 1))
    return torch.stack(outs), torch.stack(lses), torch.cat(rows, dim=2)


def _attend_one_sequence(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(Lq, H, D), (Lk, H, D) → out (Lq, H, D), lse (H, Lq), probabilities (H, Lq, Lk)."""
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    if bias is not None:
        bias_HK = bias[None, :] if bias.ndim == 1 else bias.T
        scores = scores + bias_HK[:, None, :].to(scores.dtype)
    probabilities, lse = _softmax_or_zero(scores, torch.ones_like(scores, dtype=torch.bool))
    return torch.einsum("hqk,khd->qhd", probabilities, v), lse, probabilities


def _softmax_or_zero(scores: Tensor, takes_part: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis where ``takes_part``; a row without any is 0 with lse −inf, its gradient 0."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    empty = ~takes_part.any(dim=-1, keepdim=True)
    finite = scores.masked_fill(~takes_part, float("-inf")).masked_fill(empty, 0)
    lse = finite.logsumexp(dim=-1, keepdim=True)
    probabilities = (finite - lse).exp().masked_fill(~takes_part, 0)
    return probabilities, lse.masked_fill(empty, float("-inf")).squeeze(-1)

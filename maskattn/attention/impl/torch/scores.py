"""The scores of impl "torch", and the options of given queries and keys.

Dimension key: Q queries and K keys of one sequence, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from maskattn.dropout import dropout_factors
from maskattn.operands import QKV, KeySequences, Sequences
from maskattn.options import Options

__all__ = ["OPTIONS", "ScoreDerivatives", "as_packed", "drop_factors", "options_of", "scores", "wide_dtype"]


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


class ScoreDerivatives(NamedTuple):
    """The terms of the scores' derivatives: the distances (Q, K), None without slopes."""

    distance_QK: Tensor | None

    def along_product(self, x_HQK: Tensor) -> Tensor:
        """x times the scores' derivative with respect to the scaled products, which is 1, as all terms are added."""
        return x_HQK


def scores(q: Tensor, k: Tensor, options: Options) -> tuple[Tensor, ScoreDerivatives]:
    """The scores (H, Q, K) of queries (Q, H, D) and keys (K, H, D) with their options; see ``reference.py``."""
    score_HQK = options.scale * torch.einsum("qhd,khd->hqk", q, k)
    if options.key_bias is not None:
        bias = options.key_bias.to(score_HQK.dtype)
        score_HQK += (bias[None] if bias.ndim == 1 else bias.T)[:, None, :]
    if options.slopes is None or options.coords_q is None or options.coords_k is None:
        return score_HQK, ScoreDerivatives(None)
    distance_QK = _distances(options.coords_q, options.coords_k).to(score_HQK.dtype)
    score_HQK -= options.slopes[:, None, None].to(score_HQK.dtype) * distance_QK
    return score_HQK, ScoreDerivatives(distance_QK)


def options_of(options: Options, queries: slice, keys: slice) -> Options:
    """The options of some packed queries and keys."""
    bias, coords_q, coords_k = options.key_bias, options.coords_q, options.coords_k
    return replace(
        options,
        key_bias=None if bias is None else bias[keys],
        coords_q=None if coords_q is None else coords_q[queries],
        coords_k=None if coords_k is None else coords_k[keys],
    )


def drop_factors(options: Options, like_HQK: Tensor, first_query: int, sequence: int) -> Tensor | None:
    """The dropout factors of the weights of a sequence's queries from ``first_query`` on; None without dropout."""
    if options.dropout_seed is None:
        return None
    heads, queries, keys = (torch.arange(n, device=like_HQK.device) for n in like_HQK.shape)
    queries += first_query
    if options.query_offsets is not None:
        queries += options.query_offsets[sequence]
    if options.key_offsets is not None:
        keys += options.key_offsets[sequence]
    position = queries[None, :, None], keys[None, None, :], heads[:, None, None]
    batch = torch.tensor(sequence, device=like_HQK.device)
    return dropout_factors(options.dropout_seed, options.dropout_p, *position, batch).to(like_HQK.dtype)


def as_packed(qkv: QKV, where: KeySequences, options: Options) -> tuple[QKV, Sequences, Options]:
    """A readout of q (B, R, H, D) as packed attention with R queries in each sequence."""
    B, R = qkv.q.shape[:2]
    starts = torch.arange(0, (B + 1) * R, R, dtype=torch.int32, device=qkv.q.device)
    if options.coords_q is not None:
        options = replace(options, coords_q=options.coords_q.flatten(0, 1))
    packed = QKV(qkv.q.flatten(0, 1), qkv.k, qkv.v)
    return packed, Sequences(starts, where.cu_seqlens, R, where.max_seqlen), options


def wide_dtype(q: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(q.dtype, torch.float32)


def _distances(coords_q: Tensor, coords_k: Tensor) -> Tensor:
    """(Q, 2), (K, 2) → (Q, K), 0 for tokens without a position; in float32 at least."""
    dtype = torch.promote_types(coords_q.dtype, torch.float32)
    difference = coords_q[:, None, :].to(dtype) - coords_k[None, :, :].to(dtype)
    return difference.square().sum(-1).sqrt().nan_to_num(nan=0.0)

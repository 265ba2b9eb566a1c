"""Packed attention in eager torch with every option and the log-sum-exp, a bounded number of queries at a time.

Impl "torch" uses it for options that torch's own ``scaled_dot_product_attention`` lacks. Arithmetic is float32
(float64 for float64), and no N×N array is held. Forward follows ``reference.py``. The gradients, with dropout factors m
and the gradients dO of out and dlse of lse, are

    dP_ij = m_ij dO_i·v_j      dS_ij = p_ij (dP_ij − Σ_j p_ij dP_ij + dlse_i)      dslope = −Σ_ij dS_ij ‖x_i − x_j‖

    dq_i = s Σ_j dS_ij k_j     dk_j = s Σ_i dS_ij q_i     dv_j = Σ_i m_ij p_ij dO_i     dbias_j = Σ_i dS_ij

Dimension key: Tq and Tk packed query and key tokens, H heads, D head width; Q queries and K keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maskattn.attention.impl.torch.scores import (
    ScoreDerivatives,
    as_packed,
    drop_factors,
    options_of,
    scores,
    wide_dtype,
)
from maskattn.operands import QKV, KeySequences, Sequences
from maskattn.options import Options
from maskattn.results import Gradients

__all__ = ["attend_in_blocks", "blocks_of_queries", "differentiate_in_blocks", "rest_of_lse"]

_SCORES_AT_ONCE = 1 << 20  # 4 MiB of float32


def attend_in_blocks(qkv: QKV, where: Sequences, options: Options, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute out (Tq, H, D) and lse (H, Tq); fill ``rows`` (R, H, Tk), the weights of R queries before dropout."""
    q, v = qkv.q, qkv.v
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide_dtype(q))
    for block in blocks_of_queries(qkv, where, options):
        values = v[block.keys].to(lse.dtype)
        out[block.queries] = torch.einsum("hqk,khd->qhd", block.dropped(block.p_HQK), values).to(q.dtype)
        lse[:, block.queries] = block.lse_HQ
        if rows is not None:
            rows[block.within(rows.shape[0]), :, block.keys] = block.p_HQK.transpose(0, 1)
    return out, lse


def differentiate_in_blocks(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: QKV,
    where: Sequences,
    options: Options,
    grad_rows: Tensor | None = None,
) -> Gradients:
    """Gradients of :func:`attend_in_blocks`; the weights are recomputed block by block."""
    q, k, v, wide = qkv.q, qkv.k, qkv.v, wide_dtype(qkv.q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    bias, slopes = options.key_bias, options.slopes
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=bias.device)
    dslopes = None if slopes is None else torch.zeros(slopes.shape, dtype=wide, device=slopes.device)
    for block in blocks_of_queries(qkv, where, options):
        queries, keys = block.queries, block.keys
        dout = grad_out[queries].to(wide)
        dp = block.dropped(torch.einsum("qhd,khd->hqk", dout, v[keys].to(wide)))
        if grad_rows is not None:
            dp = dp + grad_rows[block.within(grad_rows.shape[0]), :, keys].transpose(0, 1).to(wide)
        delta = (block.p_HQK * dp).sum(dim=-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, queries, None].to(wide).masked_fill(block.lse_HQ[..., None].isinf(), 0)
        ds = block.p_HQK * (dp - delta)
        dproduct = block.derivatives.along_product(ds)
        dq[queries] = options.scale * torch.einsum("hqk,khd->qhd", dproduct, k[keys].to(wide))
        dk[keys] += options.scale * torch.einsum("hqk,qhd->khd", dproduct, q[queries].to(wide))
        dv[keys] += torch.einsum("hqk,qhd->khd", block.dropped(block.p_HQK), dout)
        if dbias is not None:
            by_key = ds.sum(dim=1).T  # [K, H]
            dbias[keys] += by_key if dbias.ndim == 2 else by_key.sum(dim=1)
        if dslopes is not None and block.derivatives.distance_QK is not None:
            # A matrix product would round more, because it forms a single running sum.
            dslopes -= (ds * block.derivatives.distance_QK).sum(dim=(1, 2))
    return Gradients(
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        None if bias is None or dbias is None else dbias.to(bias.dtype),
        None if slopes is None or dslopes is None else dslopes.to(slopes.dtype),
    )


def rest_of_lse(qkv: QKV, lse: Tensor, where: KeySequences, options: Options) -> Tensor:
    """The rounding error of the lse (B, R, H) of a readout of q (B, R, H, D), from recomputed scores."""
    rest = torch.zeros_like(lse)
    flat_rest, flat_lse = rest.view(-1, lse.shape[-1]), lse.flatten(0, 1)
    for block in blocks_of_queries(*as_packed(qkv, where, options)):
        exact = block.lse_HQ.T - flat_lse[block.queries] + block.rest_HQ.T
        flat_rest[block.queries] = exact.nan_to_num(nan=0.0).to(rest.dtype)
    return rest


@dataclass(frozen=True)
class _Block:
    """The weights of some queries of a sequence over all its keys."""

    queries: slice
    keys: slice
    p_HQK: Tensor
    lse_HQ: Tensor
    rest_HQ: Tensor  # the rounding error of lse
    derivatives: ScoreDerivatives
    factors_HQK: Tensor | None

    def within(self, count: int) -> slice:
        """The queries' positions within their sequence, for sequences of ``count`` queries each."""
        first = self.queries.start % count
        return slice(first, first + self.queries.stop - self.queries.start)

    def dropped(self, x_HQK: Tensor) -> Tensor:
        """x times the dropout factors of the weights, in forward and backward alike."""
        return x_HQK if self.factors_HQK is None else x_HQK * self.factors_HQK


def blocks_of_queries(qkv: QKV, where: Sequences, options: Options) -> Iterator[_Block]:
    """Yield the weights of all queries, sequence by sequence, in blocks of bounded memory."""
    q, k = qkv.q, qkv.k
    starts_q, starts_k = where.cu_seqlens_q.tolist(), where.cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        keys = slice(starts_k[b], starts_k[b + 1])
        if keys.start == keys.stop:
            continue
        own_k = k[keys].to(wide_dtype(k))
        step = max(1, _SCORES_AT_ONCE // (k.shape[1] * len(own_k)))
        for start in range(starts_q[b], starts_q[b + 1], step):
            queries = slice(start, min(start + step, starts_q[b + 1]))
            score, derivatives = scores(q[queries].to(own_k.dtype), own_k, options_of(options, queries, keys))
            largest = score.amax(dim=-1, keepdim=True)
            # A query whose keys all have a bias of −inf has no finite largest score, and no weights.
            largest = largest.masked_fill(largest == float("-inf"), 0)
            p = score.sub_(largest).exp_()
            total = p.sum(dim=-1, keepdim=True)
            logarithm = total.log()
            lse = largest + logarithm
            rest = torch.where(total == 0, 0, largest - lse + logarithm)[..., 0]
            p /= total.masked_fill(total == 0, 1)
            factors = drop_factors(options, p, start - starts_q[b], b)
            yield _Block(queries, keys, p, lse[..., 0], rest, derivatives, factors)

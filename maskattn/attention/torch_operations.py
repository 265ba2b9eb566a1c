"""impl "torch": every operation in torch's own functions; any device, nothing to build.

Dimension key: B sequences, N grid tokens, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskattn.attention.dense import DenseRows, gather
from maskattn.attention.reference import distances
from maskattn.attention.torch_blocks import (
    attend_in_blocks,
    differentiate_in_blocks,
    options_as_packed,
    wide_dtype,
)
from maskattn.attention.torch_sdpa import packed_backward as _packed_backward
from maskattn.attention.torch_sdpa import packed_forward
from maskattn.options import Gradients, Options, Sequences

__all__ = [
    "masked_backward",
    "masked_forward",
    "packed_backward",
    "packed_forward",
    "readout_backward",
    "readout_forward",
    "token_relevance",
]

_PRODUCTS_AT_ONCE = 1 << 22  # 16 MiB of float32


def packed_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    sequences: Sequences,
    options: Options,
) -> Gradients:
    """Gradients of ``packed_forward``; what it left is not needed, for torch's own backward starts from the inputs."""
    return _packed_backward(grad_out, grad_lse, q, k, v, sequences, options)


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense (B, H, N, D) in, out (B, H, Nq, D) and lse (B, H, Nq), (B, H, 0) where unasked: pack, attend, unpack."""
    rows = DenseRows.of(q, keep, skip_queries)
    packed = gather(q, rows.queries), gather(k, rows.keys), gather(v, rows.keys)
    out, lse, none = packed_forward(*packed, rows.sequences, rows.packed_options(options), need_lse)
    shape = tuple(q.shape)
    lse = rows.dense_lse(lse, shape) if need_lse else lse.new_empty((*shape[:2], 0))
    return rows.dense_out(out, shape), lse, none


def masked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    keep: Tensor,
    skip_queries: bool,
    options: Options,
) -> Gradients:
    """Gradients of :func:`masked_forward`, 0 at background positions."""
    rows = DenseRows.of(q, keep, skip_queries)
    grads = _packed_backward(
        gather(grad_out, rows.queries),
        None if grad_lse is None else gather(grad_lse[..., None], rows.queries)[..., 0].T,
        gather(q, rows.queries),
        gather(k, rows.keys),
        gather(v, rows.keys),
        rows.sequences,
        rows.packed_options(options),
    )
    return rows.dense_gradients(grads, q, k, options)


def readout_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
    need_lse: bool,
    need_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, R, H, D), lse (B, R, H), no rest, and rows (R, H, T); lse and rows of no elements where unasked."""
    B, R, H, _ = q.shape
    rows = torch.zeros((R, H, k.shape[0] if need_rows else 0), dtype=wide_dtype(q), device=q.device)
    sequences, own = options_as_packed(q, cu_seqlens, max_seqlen, options)
    if not (need_lse or need_rows):
        out, _, none = packed_forward(q.flatten(0, 1), k, v, sequences, own, False)
        return out.view(q.shape), rows.new_empty((B, R, 0)), none, rows
    out, lse = attend_in_blocks(q.flatten(0, 1), k, v, sequences, own, rows if need_rows else None)
    return out.view(q.shape), lse.view(H, B, R).permute(1, 2, 0).contiguous(), rows.new_empty(0), rows


def readout_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
) -> Gradients:
    """Gradients of :func:`readout_forward`."""
    sequences, own = options_as_packed(q, cu_seqlens, max_seqlen, options)
    flat_lse = None if grad_lse is None else grad_lse.flatten(0, 1).T
    flat_out, flat_q = grad_out.flatten(0, 1), q.flatten(0, 1)
    if grad_rows is None:
        grads = _packed_backward(flat_out, flat_lse, flat_q, k, v, sequences, own)
    else:
        grads = differentiate_in_blocks(flat_out, flat_lse, flat_q, k, v, sequences, own, grad_rows)
    return replace(grads, q=grads.q.view(q.shape))


def token_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    key_origin: Tensor | None,
    value_origin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
) -> Tensor:
    """S (K, T), a bounded number of keys at a time; formula in ``reference.py``."""
    K, B, R, H, _ = grad_out.shape
    wide = wide_dtype(q)
    relevance = torch.zeros((K, k.shape[0]), dtype=wide, device=k.device)
    starts = cu_seqlens.tolist()
    step = max(1, _PRODUCTS_AT_ONCE // max(1, K * R * H))
    for b in range(B):
        q_RHD, g_KRHD = q[b].to(wide), grad_out[:, b].to(wide)
        read_KRH = (out[b].to(wide) * g_KRHD).sum(-1)
        for first in range(starts[b], starts[b + 1], step):
            keys = slice(first, min(first + step, starts[b + 1]))
            moved_k, moved_v = (_moved(x, origin, keys, wide) for x, origin in ((k, key_origin), (v, value_origin)))
            scores_RHT = options.scale * torch.einsum("rhd,thd->rht", q_RHD, k[keys].to(wide))
            if options.key_bias is not None:
                bias = options.key_bias[keys].to(wide)
                scores_RHT += bias if bias.ndim == 1 else bias.T
            if options.slopes is not None and options.coords_q is not None and options.coords_k is not None:
                distance_RT = distances(options.coords_q[b], options.coords_k[keys]).to(wide)
                scores_RHT -= options.slopes[:, None].to(wide) * distance_RT[:, None, :]
            lse_RH1 = lse[b][..., None].to(wide)
            p_RHT = (scores_RHT - lse_RH1.masked_fill(lse_RH1.isinf(), 0)).exp()
            change_RHT = options.scale * torch.einsum("rhd,thd->rht", q_RHD, moved_k)
            from_score = torch.einsum("crhd,thd->crht", g_KRHD, v[keys].to(wide)) - read_KRH[..., None]
            from_value = torch.einsum("crhd,thd->crht", g_KRHD, moved_v)
            relevance[:, keys] = (p_RHT * (from_value + from_score * change_RHT)).sum((1, 2))
    return relevance


def _moved(x: Tensor, origin: Tensor | None, keys: slice, wide: torch.dtype) -> Tensor:
    rows = x[keys].to(wide)
    return rows if origin is None else rows - (origin[keys] if origin.ndim == 3 else origin).to(wide)

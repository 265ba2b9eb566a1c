"""impl "torch": torch's own ``scaled_dot_product_attention`` on each packed sequence; any device, nothing to build.

Sequences of one length go through in one batched call, others one by one; either way nothing of size N×N is held.
(Padding short sequences into one masked call was measured on a CPU: 1.5 to 5 times slower forward.) A key bias rides
inside the dot product, as one more column of width ``[q, 1/s]·[k, b]``, so that its gradient comes from the same fused
backward. torch does not hand out the log-sum-exp: where a caller asks for it, it is computed in blocks of queries.

Dimension key: B sequences, L tokens of one, T packed tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.packing import Packing

__all__ = ["masked_backward", "masked_forward", "packed_backward", "packed_forward"]

_SCORES_AT_ONCE = 1 << 20  # bounds the memory of the log-sum-exp: 4 MiB of float32


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Packed rows in, out (Tq, H, D) and lse (H, Tq); lse is (H, 0) unless ``need_lse``."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0] if need_lse else 0), float("-inf"), dtype=_lse_dtype(q))
    for rows_q, rows_k, count in _sequences(cu_seqlens_q, cu_seqlens_k):
        bias = None if key_bias is None else key_bias[rows_k]
        out[rows_q] = _attend(q[rows_q], k[rows_k], v[rows_k], bias, scale, count)
    if need_lse:
        for rows, _, scores in _score_blocks(q, k, cu_seqlens_q, cu_seqlens_k, key_bias, scale):
            lse[:, rows] = scores.logsumexp(dim=-1)
    return out, lse


def packed_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`packed_forward`; the forward is run again, sequence by sequence."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    grad_bias = None if key_bias is None else torch.zeros_like(key_bias, memory_format=torch.contiguous_format)
    for rows_q, rows_k, count in _sequences(cu_seqlens_q, cu_seqlens_k):
        bias = None if key_bias is None else key_bias[rows_k]
        operands = (q[rows_q], k[rows_k], v[rows_k], *(() if bias is None else (bias,)))

        def attend(q_: Tensor, k_: Tensor, v_: Tensor, bias_: Tensor | None = None, count: int = count) -> Tensor:
            return _attend(q_, k_, v_, bias_, scale, count)

        # torch.func.vjp, because a custom op's body runs below autograd, where enable_grad records nothing.
        _, pull_back = torch.func.vjp(attend, *operands)[:2]
        pieces = pull_back(grad_out[rows_q])
        for grad, rows, piece in zip(grads, (rows_q, rows_k, rows_k), pieces, strict=False):
            grad[rows] = piece
        if grad_bias is not None:
            grad_bias[rows_k] = pieces[3]
    if grad_lse is not None:
        _add_lse_gradient(grad_lse, grads, grad_bias, q, k, cu_seqlens_q, cu_seqlens_k, key_bias, scale)
    return grads[0], grads[1], grads[2], grad_bias


def masked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    key_bias: Tensor | None,
    scale: float,
    skip_queries: bool,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Dense (B, H, N, D) in, out (B, H, Nq, D) and lse (B, H, Nq): pack, attend, unpack."""
    keys = Packing.from_keep(keep)
    queries = keys if skip_queries else _every_query(q)
    rows, lse = packed_forward(
        _gather(q, queries),
        _gather(k, keys),
        _gather(v, keys),
        queries.cu_seqlens,
        keys.cu_seqlens,
        _gather_bias(key_bias, keys),
        scale,
        need_lse,
    )
    B, H, Nq = q.shape[:3]
    lse_BHN = lse.new_full((B, H, Nq if need_lse else 0), float("-inf"))
    if need_lse:
        _scatter(lse_BHN[..., None], lse.T[..., None], queries)
    return _scatter(torch.zeros_like(q, memory_format=torch.contiguous_format), rows, queries), lse_BHN


def masked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    key_bias: Tensor | None,
    scale: float,
    skip_queries: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`masked_forward`, 0 at background positions."""
    keys = Packing.from_keep(keep)
    queries = keys if skip_queries else _every_query(q)
    *rows, bias_rows = packed_backward(
        _gather(grad_out, queries),
        None if grad_lse is None else _gather(grad_lse[..., None], queries)[..., 0].T,
        _gather(q, queries),
        _gather(k, keys),
        _gather(v, keys),
        queries.cu_seqlens,
        keys.cu_seqlens,
        _gather_bias(key_bias, keys),
        scale,
    )
    grads = [
        _scatter(torch.zeros_like(x, memory_format=torch.contiguous_format), grad, packing)
        for x, grad, packing in zip((q, k, v), rows, (queries, keys, keys), strict=True)
    ]
    if key_bias is None or bias_rows is None:
        return grads[0], grads[1], grads[2], None
    grad_bias = torch.zeros_like(key_bias, memory_format=torch.contiguous_format)
    if key_bias.ndim == 2:
        grad_bias.view(-1)[keys.indices] = bias_rows
    else:
        _scatter(grad_bias[..., None], bias_rows[..., None], keys)
    return grads[0], grads[1], grads[2], grad_bias


def _every_query(q: Tensor) -> Packing:
    B, _, Nq, _ = q.shape
    starts = torch.arange(0, B * Nq + 1, max(Nq, 1), dtype=torch.int32, device=q.device)[: B + 1]
    return Packing(torch.arange(B * Nq, device=q.device), starts, Nq, B, Nq)


def _place(packing: Packing) -> tuple[Tensor, Tensor]:
    sequence = packing.sequence_of_token
    return sequence, packing.indices - sequence * packing.num_tokens


def _gather(x_BHND: Tensor, packing: Packing) -> Tensor:
    """(B, H, N, D) → (T, H, D)."""
    return x_BHND.transpose(1, 2)[_place(packing)]


def _gather_bias(key_bias: Tensor | None, packing: Packing) -> Tensor | None:
    """(B, N) → (T,), or (B, H, N) → (T, H)."""
    if key_bias is None:
        return None
    return key_bias[_place(packing)] if key_bias.ndim == 2 else _gather(key_bias[..., None], packing)[..., 0]


def _scatter(dense_BHND: Tensor, rows_THD: Tensor, packing: Packing) -> Tensor:
    dense_BHND.transpose(1, 2)[_place(packing)] = rows_THD
    return dense_BHND


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, count: int) -> Tensor:
    """``count`` sequences of one query and one key length, end to end: (count·Lq, H, D) → (count·Lq, H, D)."""
    width = q.shape[-1]
    if bias is not None:
        bias_TH1 = (bias[:, None] if bias.ndim == 1 else bias)[..., None].expand(-1, k.shape[1], 1)
        q = torch.cat([q, q.new_full((*q.shape[:-1], 1), 1 / scale)], dim=-1)
        k = torch.cat([k, bias_TH1.to(k.dtype)], dim=-1)
        v = F.pad(v, (0, 1))
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # [count, H, L, D]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)[..., :width]


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Query rows, key rows and how many sequences they hold: all at once where all have one length."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    count = len(starts_q) - 1
    lengths = {(starts_q[b + 1] - starts_q[b], starts_k[b + 1] - starts_k[b]) for b in range(count)}
    if len(lengths) == 1 and 0 not in next(iter(lengths)):
        yield slice(0, starts_q[-1]), slice(0, starts_k[-1]), count
        return
    for b in range(count):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        if rows_q.start < rows_q.stop and rows_k.start < rows_k.stop:
            yield rows_q, rows_k, 1


def _score_blocks(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Query rows, key rows and their scores (H, block, Lk), a bounded number of queries at a time."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows_k = slice(starts_k[b], starts_k[b + 1])
        if rows_k.start == rows_k.stop:
            continue
        keys = k[rows_k].to(_lse_dtype(k))
        block = max(1, _SCORES_AT_ONCE // (k.shape[1] * len(keys)))
        for start in range(starts_q[b], starts_q[b + 1], block):
            rows = slice(start, min(start + block, starts_q[b + 1]))
            scores = scale * torch.einsum("qhd,khd->hqk", q[rows].to(keys.dtype), keys)
            if key_bias is not None:
                bias = key_bias[rows_k]
                scores = scores + (bias[None] if bias.ndim == 1 else bias.T)[:, None, :].to(scores.dtype)
            yield rows, rows_k, scores


def _add_lse_gradient(
    grad_lse: Tensor,
    grads: list[Tensor],
    grad_bias: Tensor | None,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> None:
    """∂lse_i/∂score_ij = p_ij, so the scores' gradient is p_ij · ∂lse_i."""
    for rows, rows_k, scores in _score_blocks(q, k, cu_seqlens_q, cu_seqlens_k, key_bias, scale):
        grad_scores = scores.softmax(dim=-1) * grad_lse[:, rows, None].to(scores.dtype)  # [H, block, Lk]
        grads[0][rows] += (scale * torch.einsum("hqk,khd->qhd", grad_scores, k[rows_k].to(scores.dtype))).to(q.dtype)
        grads[1][rows_k] += (scale * torch.einsum("hqk,qhd->khd", grad_scores, q[rows].to(scores.dtype))).to(k.dtype)
        if grad_bias is not None:
            by_key = grad_scores.sum(dim=1).T  # [Lk, H]
            grad_bias[rows_k] += (by_key.sum(dim=1) if grad_bias.ndim == 1 else by_key).to(grad_bias.dtype)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)

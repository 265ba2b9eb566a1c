"""Packed attention by torch's own ``scaled_dot_product_attention``, one packed sequence at a time.

Sequences of equal length go through in one batched call, others one by one; in neither case is an N×N array held.
(Padding short sequences into one masked call was measured on a CPU: 1.5 to 5 times slower forward.) A key bias is an
additional column of the dot product, ``[q, 1/s]·[k, b]``, so that the same fused backward gives its gradient. torch
neither returns the log-sum-exp nor supports the other options; ``blocks.py`` does.

Dimension key: L tokens of a sequence, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.attention.impl.torch.blocks import attend_in_blocks, differentiate_in_blocks
from maskattn.attention.impl.torch.scores import wide_dtype
from maskattn.operands import QKV, Sequences
from maskattn.options import Options, is_given
from maskattn.results import Gradients, OutputGradients, Outputs

__all__ = ["packed_backward", "packed_forward"]

LARGEST_RIDING_BIAS = 64.0

# Options that torch's function lacks, with their defaults: all but the scale and the bias in the dot product, and the
# allowances, which ask nothing of it.
_NOT_IN_BLOCKS = ("scale", "key_bias", "precision", "deterministic")
_IN_BLOCKS = [(x.name, x.default) for x in fields(Options) if x.name not in _NOT_IN_BLOCKS]


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """Attention of packed sequences; lse is (H, 0) unless ``need_lse``, and has no rest."""
    q, k, v = qkv.q, qkv.k, qkv.v
    unasked = q.new_empty((q.shape[1], 0), dtype=wide_dtype(q))
    none = unasked.new_empty(0)
    if need_lse or not _fits(options):
        out, lse = attend_in_blocks(qkv, where, options)
        return Outputs(out, lse if need_lse else unasked, none)
    found = _Rows(q)
    for queries, keys, count in _slices(where):
        bias = None if options.key_bias is None else options.key_bias[keys]
        found.put(queries, _attend(q[queries], k[keys], v[keys], bias, options.scale, count))
    return Outputs(found.all(), unasked, none)


def packed_backward(grads: OutputGradients, qkv: QKV, where: Sequences, options: Options) -> Gradients:
    """Gradients of :func:`packed_forward`; forward is recomputed, sequence by sequence."""
    if grads.grad_lse is not None or not _fits(options):
        return differentiate_in_blocks(grads.grad_out, grads.grad_lse, qkv, where, options)
    inputs = [x for x in (qkv.q, qkv.k, qkv.v, options.key_bias) if x is not None]
    found = [_Rows(x) for x in inputs]
    for queries, keys, count in _slices(where):

        def attend(q_: Tensor, k_: Tensor, v_: Tensor, bias_: Tensor | None = None, count: int = count) -> Tensor:
            return _attend(q_, k_, v_, bias_, options.scale, count)

        own = [queries, *([keys] * (len(inputs) - 1))]
        # torch.func.vjp, because a custom op's body runs below autograd, where enable_grad records nothing.
        _, pull_back = torch.func.vjp(attend, *(x[tokens] for x, tokens in zip(inputs, own, strict=True)))[:2]
        for grad, tokens, piece in zip(found, own, pull_back(grads.grad_out[queries]), strict=True):
            grad.put(tokens, piece)
    return Gradients(*(grad.all() for grad in found))


class _Rows:
    """A tensor like another that is assembled from rows, 0 elsewhere; rows that make up all of it are not copied."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._rows: Tensor | None = None

    def put(self, tokens: slice, rows: Tensor) -> None:
        if rows.shape == self._like.shape:
            self._rows = rows
        else:
            self._rows = self.all()
            self._rows[tokens] = rows

    def all(self) -> Tensor:
        if self._rows is None:
            return torch.zeros_like(self._like, memory_format=torch.contiguous_format)
        return self._rows


def _slices(where: Sequences) -> Iterator[tuple[slice, slice, int]]:
    """Yield slices of queries and keys, and their number of sequences: a single slice if all have one length."""
    starts_q, starts_k = where.cu_seqlens_q.tolist(), where.cu_seqlens_k.tolist()
    count = len(starts_q) - 1
    lengths = {(starts_q[b + 1] - starts_q[b], starts_k[b + 1] - starts_k[b]) for b in range(count)}
    if len(lengths) == 1 and 0 not in next(iter(lengths)):
        yield slice(0, starts_q[-1]), slice(0, starts_k[-1]), count
        return
    for b in range(count):
        queries, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        if queries.start < queries.stop and keys.start < keys.stop:
            yield queries, keys, 1


def _fits(options: Options) -> bool:
    """Whether :func:`_attend` supports the options that are given."""
    given = vars(options)
    for name, default in _IN_BLOCKS:
        if given[name] is not default and is_given(given[name], default):
            return False
    if options.key_bias is None:
        return True
    # Inside the dot product a larger bias would cost the other terms precision, or overflow.
    return options.scale != 0 and bool((options.key_bias.abs() <= LARGEST_RIDING_BIAS).all())


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, count: int) -> Tensor:
    """Attention of ``count`` consecutive sequences of equal lengths: (count·Lq, H, D) → (count·Lq, H, D)."""
    width = q.shape[-1]
    if bias is not None:
        bias_TH1 = (bias[:, None] if bias.ndim == 1 else bias)[..., None].expand(-1, k.shape[1], 1)
        q = torch.cat([q, q.new_full((*q.shape[:-1], 1), 1 / scale)], dim=-1)
        k = torch.cat([k, bias_TH1.to(k.dtype)], dim=-1)
        v = F.pad(v, (0, 1))
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # [count, H, L, D]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)[..., :width]

"""Conversion of dense tensors with a mask to packed tensors, and back.

Dimension key: B sequences, N grid tokens (Nq of the queries), Tq and Tk packed query and key tokens, H heads, D head
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskattn.operands import QKV, Mask, Sequences
from maskattn.options import Options
from maskattn.packing import Packing
from maskattn.results import Gradients

__all__ = ["DensePacking", "gather"]


@dataclass(frozen=True)
class DensePacking:
    """The packings of the queries and of the keys of dense tensors."""

    queries: Packing
    keys: Packing

    @classmethod
    def of(cls, q: Tensor, where: Mask) -> DensePacking:
        """Build the packings for q (B, H, Nq, D) and a mask; without ``skip_queries`` every query takes part."""
        keys = Packing.from_keep(where.keep)
        if where.skip_queries:
            return cls(keys, keys)
        every = torch.ones((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
        return cls(Packing.from_keep(every), keys)

    @property
    def sequences(self) -> Sequences:
        """The packed sequences' offsets and lengths."""
        return Sequences(self.queries.cu_seqlens, self.keys.cu_seqlens, self.queries.max_seqlen, self.keys.max_seqlen)

    def packed(self, qkv: QKV) -> QKV:
        """The tokens that take part: (Tq, H, D) and (Tk, H, D)."""
        return QKV(gather(qkv.q, self.queries), gather(qkv.k, self.keys), gather(qkv.v, self.keys))

    def packed_options(self, options: Options) -> Options:
        """The options of the packed tensors."""
        coords_q, coords_k = options.coords_q, options.coords_k
        if options.key_bias is None and coords_q is None and coords_k is None:
            return options
        return replace(
            options,
            key_bias=self.packed_bias(options.key_bias),
            coords_q=None if coords_q is None else coords_q[_positions(self.queries)],
            coords_k=None if coords_k is None else coords_k[_positions(self.keys)],
        )

    def packed_bias(self, bias: Tensor | None) -> Tensor | None:
        """(B, N) or (B, H, N) → (Tk,) or (Tk, H)."""
        if bias is None:
            return None
        return bias[_positions(self.keys)] if bias.ndim == 2 else gather(bias[..., None], self.keys)[..., 0]

    def dense_out(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(Tq, H, D) → (B, H, Nq, D)."""
        return _scatter(out, self.queries, shape)

    def dense_lse(self, lse: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(H, Tq) → (B, H, Nq), −inf for queries that take no part."""
        lse_BHN = lse.new_full(shape[:3], float("-inf"))
        lse_BHN.transpose(1, 2)[_positions(self.queries)] = lse.T
        return lse_BHN

    def dense_gradients(self, grads: Gradients, qkv: QKV, options: Options) -> Gradients:
        """Gradients of the dense tensors from those of the packed ones, 0 at background positions."""
        bias = options.key_bias
        dbias = grads.key_bias
        if bias is not None and dbias is not None and bias.ndim == 2:
            dense_bias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
            dense_bias[_positions(self.keys)] = dbias
            dbias = dense_bias
        elif bias is not None and dbias is not None:
            dbias = _scatter(dbias[..., None], self.keys, (*bias.shape, 1))[..., 0]
        return replace(
            grads,
            q=_scatter(grads.q, self.queries, tuple(qkv.q.shape)),
            k=_scatter(grads.k, self.keys, tuple(qkv.k.shape)),
            v=_scatter(grads.v, self.keys, tuple(qkv.k.shape)),
            key_bias=dbias,
        )


def gather(x_BHND: Tensor, packing: Packing) -> Tensor:
    """(B, H, N, D) → (T, H, D)."""
    return x_BHND.transpose(1, 2)[_positions(packing)]


def _scatter(packed_THD: Tensor, packing: Packing, shape: tuple[int, ...]) -> Tensor:
    """(T, H, D) → a (B, H, N, D) tensor of ``shape``, 0 elsewhere."""
    dense_BHND = packed_THD.new_zeros(shape)
    dense_BHND.transpose(1, 2)[_positions(packing)] = packed_THD
    return dense_BHND


def _positions(packing: Packing) -> tuple[Tensor, Tensor]:
    """Sequence and grid token of each packed row."""
    sequence = packing.sequence_of_token
    return sequence, packing.indices - sequence * packing.num_tokens

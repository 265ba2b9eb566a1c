"""From dense tensors and a mask to packed ones and back, for implementations that work on packed rows.

Dimension key: B sequences, N grid tokens (Nq of the queries), Tq and Tk packed query and key tokens, H heads, D head
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskattn.options import Gradients, Options, Sequences
from maskattn.packing import Packing

__all__ = ["DenseRows", "gather"]


@dataclass(frozen=True)
class DenseRows:
    """Which rows of dense queries and keys take part."""

    queries: Packing
    keys: Packing

    @classmethod
    def of(cls, q: Tensor, keep: Tensor, skip_queries: bool) -> DenseRows:
        """q (B, H, Nq, D) and keep (B, N); without ``skip_queries`` every query takes part."""
        keys = Packing.from_keep(keep)
        if skip_queries:
            return cls(keys, keys)
        every = torch.ones((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
        return cls(Packing.from_keep(every), keys)

    @property
    def sequences(self) -> Sequences:
        """Where the packed sequences lie."""
        return Sequences(self.queries.cu_seqlens, self.keys.cu_seqlens, self.queries.max_seqlen, self.keys.max_seqlen)

    def packed_options(self, options: Options) -> Options:
        """The options of the packed tensors."""
        bias = options.key_bias
        if bias is not None:
            bias = bias[_place(self.keys)] if bias.ndim == 2 else gather(bias[..., None], self.keys)[..., 0]
        return replace(
            options,
            key_bias=bias,
            coords_q=None if options.coords_q is None else options.coords_q[_place(self.queries)],
            coords_k=None if options.coords_k is None else options.coords_k[_place(self.keys)],
        )

    def dense_out(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(Tq, H, D) → (B, H, Nq, D)."""
        return scatter(out, self.queries, shape)

    def dense_lse(self, lse: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(H, Tq) → (B, H, Nq), −inf for queries that take no part."""
        lse_BHN = lse.new_full(shape[:3], float("-inf"))
        lse_BHN.transpose(1, 2)[_place(self.queries)] = lse.T
        return lse_BHN

    def dense_gradients(self, grads: Gradients, q: Tensor, k: Tensor, options: Options) -> Gradients:
        """Gradients of packed tensors → of dense ones, 0 at background positions."""
        bias = options.key_bias
        dbias = grads.key_bias
        if bias is not None and dbias is not None and bias.ndim == 2:
            dense_bias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
            dense_bias[_place(self.keys)] = dbias
            dbias = dense_bias
        elif bias is not None and dbias is not None:
            dbias = scatter(dbias[..., None], self.keys, (*bias.shape, 1))[..., 0]
        return Gradients(
            scatter(grads.q, self.queries, tuple(q.shape)),
            scatter(grads.k, self.keys, tuple(k.shape)),
            scatter(grads.v, self.keys, tuple(k.shape)),
            dbias,
            grads.slopes,
        )


def gather(x_BHND: Tensor, packing: Packing) -> Tensor:
    """(B, H, N, D) → (T, H, D)."""
    return x_BHND.transpose(1, 2)[_place(packing)]


def scatter(rows_THD: Tensor, packing: Packing, shape: tuple[int, ...]) -> Tensor:
    """(T, H, D) → a (B, H, N, D) tensor of ``shape``, 0 elsewhere."""
    dense_BHND = rows_THD.new_zeros(shape)
    dense_BHND.transpose(1, 2)[_place(packing)] = rows_THD
    return dense_BHND


def _place(packing: Packing) -> tuple[Tensor, Tensor]:
    """Sequence and grid token of each packed row."""
    sequence = packing.sequence_of_token
    return sequence, packing.indices - sequence * packing.num_tokens

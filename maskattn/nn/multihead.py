"""``nn.MultiheadAttention`` with masked keys packed away: the layer to swap into a model that has torch's.

The only place where PyTorch's polarity (``key_padding_mask``, True = ignore) is turned into the package's ``keep``.

Dimension key: B sequences, L queries and S keys of each, Tq and Tk packed queries and keys, E channels, H heads, D head
width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.attention.api import packed_attention
from maskattn.packing import Packing, pack, unpack

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """torch's layer, with its arguments, parameters, initialisation and state-dict keys, over the kept keys alone.

    Masked keys are packed away before the projections: they cost nothing and are never read. It differs from torch's
    layer in one result: a query whose keys are all masked gives 0 before the output projection, where torch may give
    NaN.

    Not yet taken, and refused by name: ``attn_mask``, ``is_causal``, ``add_bias_kv``, ``add_zero_attn``, and dropout in
    training.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch.nn.MultiheadAttention has them.
        skip_queries: for self-attention, masked positions are not queries either; their output is 0.
        impl: implementation of the attention; None takes the best.

    Raises:
        ValueError: an argument that the layer does not take.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        skip_queries: bool = False,
        impl: str | None = None,
    ) -> None:
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                "add_bias_kv and add_zero_attn are not taken by maskattn.nn.MultiheadAttention, got "
                f"add_bias_kv={add_bias_kv}, add_zero_attn={add_zero_attn}; use torch.nn.MultiheadAttention for them"
            )
        super().__init__(
            embed_dim, num_heads, dropout, bias, False, False, kdim, vdim, batch_first, device=device, dtype=dtype
        )
        self.skip_queries = skip_queries
        self.impl = impl

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. Arguments and results as torch.nn.MultiheadAttention has them.

        Args:
            query: (L, B, E), or (B, L, E) if ``batch_first``, or (L, E).
            key, value: likewise with S and kdim or vdim.
            key_padding_mask: (B, S), or (S,); bool, True = ignore the key; or float, added to its scores.
            need_weights: also return the attention weights, the one thing here of size L·S; ask for False otherwise.
            average_attn_weights: their mean over heads, (B, L, S), instead of (B, H, L, S).
            attn_mask, is_causal: refused.

        Returns:
            The output, shaped as ``query``, and the weights or None.

        Raises:
            TypeError, ValueError: an argument that the layer does not take, or shapes that do not fit.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(
                "attn_mask and is_causal are not taken by maskattn.nn.MultiheadAttention, which masks keys alone; "
                "pass key_padding_mask, or use torch.nn.MultiheadAttention"
            )
        if self.training and self.dropout > 0:
            raise ValueError(
                f"dropout of attention weights is not taken in training, got dropout={self.dropout}; use dropout=0"
            )
        batched = query.ndim == 3
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        keep_BS, bias_BS = _read_padding_mask(key_padding_mask, key, batched)
        if self.skip_queries and query.shape[1] != key.shape[1]:
            raise ValueError(
                "skip_queries=True reads key_padding_mask for the queries too, so both must have one length, got "
                f"{query.shape[1]} queries and {key.shape[1]} keys; use skip_queries=False for cross-attention"
            )
        keys = Packing.from_keep(keep_BS)
        queries = keys if self.skip_queries else Packing.from_keep(keep_BS.new_ones(query.shape[:2]))
        q, k, v = self._project(pack(query, queries), pack(key, keys), pack(value, keys))
        key_bias = None if bias_BS is None else pack(bias_BS, keys)
        attended = packed_attention(
            q,
            k,
            v,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.max_seqlen,
            keys.max_seqlen,
            key_bias=key_bias,
            return_lse=need_weights,
            impl=self.impl,
        )
        out, lse = cast(tuple[Tensor, Tensor], attended) if need_weights else (cast(Tensor, attended), None)
        result = unpack(self.out_proj(out.flatten(1)), queries)
        result = result if self.batch_first or not batched else result.transpose(0, 1)
        weights = None if lse is None else _attention_weights(q, k, lse, key_bias, queries, keys)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        return (result, weights) if batched else (result[0], None if weights is None else weights[0])

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        """(B, L, E) from whatever the caller has."""
        if x.ndim != (3 if batched else 2):
            raise ValueError(
                "query, key and value must all be batched (3 dimensions) or all unbatched (2), "
                f"got one of shape {tuple(x.shape)}"
            )
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows (T, E) → q (Tq, H, D), k and v (Tk, H, D)."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v


def _read_padding_mask(mask: Tensor | None, key: Tensor, batched: bool) -> tuple[Tensor, Tensor | None]:
    """PyTorch's mask, True or −inf = ignore, to ``keep`` (B, S) and the finite part of a float mask, if any."""
    shape = tuple(key.shape[:2])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=key.device), None
    mask_BS = mask if batched else mask[None]
    if tuple(mask_BS.shape) != shape:
        raise ValueError(f"key_padding_mask must have shape {shape if batched else shape[1:]}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return ~mask_BS, None
    if not mask.dtype.is_floating_point:
        raise TypeError(f"key_padding_mask must be bool (True = ignore) or float, got {mask.dtype}")
    return mask_BS != float("-inf"), mask_BS


def _attention_weights(
    q: Tensor, k: Tensor, lse: Tensor, key_bias: Tensor | None, queries: Packing, keys: Packing
) -> Tensor:
    """(B, H, L, S), the softmax weights; 0 at masked keys and in the rows of masked queries."""
    q_BLHD, k_BSHD, lse_BLH = unpack(q, queries), unpack(k, keys), unpack(lse.T, queries)
    scores = q.shape[-1] ** -0.5 * torch.einsum("blhd,bshd->bhls", q_BLHD, k_BSHD)
    if key_bias is not None:
        scores = scores + unpack(key_bias, keys)[:, None, None, :].to(scores.dtype)
    keep_query, keep_key = (unpack(torch.ones_like(p.indices, dtype=torch.bool), p) for p in (queries, keys))
    takes_part = keep_query[:, None, :, None] & keep_key[:, None, None, :]
    log_weights = scores - lse_BLH.permute(0, 2, 1)[..., None].to(scores.dtype)
    return log_weights.masked_fill(~takes_part, float("-inf")).exp()

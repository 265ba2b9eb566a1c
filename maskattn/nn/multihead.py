"""``nn.MultiheadAttention`` with masked keys packed away: the layer to swap into a model that has torch's.

PyTorch's polarity (``key_padding_mask``, True = ignore) is converted to the package's ``keep`` here and nowhere else.

Dimension key: B sequences, L queries and S keys of each, R ≤ 16 queries of a readout, Tq and Tk packed queries and
keys, E channels, H heads (h is 1 or H, b is 1 or B), D head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.attention.api import packed_attention, readout
from maskattn.leaves import leaf_module
from maskattn.nn.kept_tokens import every_token
from maskattn.nn.multihead_inputs import check_inputs, check_masks_agree, project
from maskattn.nn.nested import nested_like, nested_rows
from maskattn.nn.operands import Operands, is_full, rows_of, scatter_rows
from maskattn.nn.padded_attention import (
    attend_causally,
    attend_under_mask,
    attend_with_weights,
    dropout_is_torchs,
)
from maskattn.nn.traced_attention import attend_to_all_tokens, is_traced
from maskattn.packing import Packing, is_jit_traced, packing_and_answer

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """A drop-in ``torch.nn.MultiheadAttention`` that attends to the kept keys alone.

    Arguments, parameters, initialisation and state-dict keys are torch's. Masked keys are removed before the
    projections: they cost nothing and are never read. Calls whose only mask is ``key_padding_mask`` use the fused
    kernels; ``attn_mask`` and ``is_causal`` use torch's ``scaled_dot_product_attention`` over the kept keys; weights
    are computed in blocks of queries. Nested tensors are accepted for self-attention.

    It differs from torch's layer in the following:

    - A query without any key to attend to gives 0 before the output projection, and weights of 0, where torch gives
      NaN or, in evaluation, values that depend on its path.
    - A key whose float ``key_padding_mask`` is −inf, or the lowest finite value of the mask's dtype, is not read at
      all: NaN in it reaches neither an output nor a gradient.
    - A float mask need not have the dtype of the query.
    - Invalid arguments raise ValueError or TypeError, where torch may also raise AssertionError or RuntimeError.
    - ``torch.jit.script`` cannot compile it; ``torch.compile`` can. ``torch.export`` and ``torch.jit.trace`` record
      torch's own operations over all tokens: masks stay inputs, and masked keys cost as much as kept ones.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            torch.nn.MultiheadAttention.
        skip_queries: for self-attention: masked positions are not queries either, and their output is 0.
        impl: the implementation of attention; None takes the best. Only "torch" (or None) supports ``attn_mask``,
            ``is_causal`` and ``need_weights=True``.

    Raises:
        ValueError, AssertionError: the sizes do not fit, as in torch.

    Example:
        >>> layer = MultiheadAttention(32, 4, batch_first=True)
        >>> x, ignore = torch.randn(2, 9, 32), torch.rand(2, 9) > 0.3
        >>> layer(x, x, x, key_padding_mask=ignore, need_weights=False)[0].shape
        torch.Size([2, 9, 32])
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
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device=device,
            dtype=dtype,
        )
        self._set_masking(skip_queries, impl)

    def _set_masking(self, skip_queries: bool, impl: str | None) -> None:
        """Set the options that torch's layer does not have, and keep torch's encoder layer from bypassing forward."""
        self.skip_queries = skip_queries
        self.impl = impl
        if _announce_forward not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_announce_forward)

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
        """Compute attention. Arguments and results are those of torch.nn.MultiheadAttention.

        Args:
            query: (L, B, E), or (B, L, E) if ``batch_first``, or (L, E).
            key, value: laid out like the query, with S tokens of width kdim and vdim.
            key_padding_mask: (B, S), or (S,); bool, True = ignore the key; or float, added to the key's scores,
                differentiable.
            need_weights: whether to return the attention weights too, the only tensor of size L·S here; pass False if
                they are not needed, or use :meth:`readout` for the rows of a few queries.
            average_attn_weights: return the mean of the weights over heads, (B, L, S), instead of (B, H, L, S).
            attn_mask: (L, S), or (B·H, L, S); bool, True = this query ignores this key; or float, added to the scores,
                differentiable.
            is_causal: a hint that ``attn_mask`` is the causal mask, which must be given too.

        Returns:
            The output, shaped like ``query``, and the weights or None. In training the weights are those after dropout;
            those of a nested query are padded with 0 to the longest sequence. Each appended key (``add_bias_kv``,
            ``add_zero_attn``) adds a column to the weights.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit, or ``impl`` does not support an argument.
            RuntimeError: ``is_causal`` without ``attn_mask``, as in torch.
        """
        if isinstance(query, torch.fx.Proxy):
            masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return leaf_module(self, query, key, value, *masks)
        if query.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            if masked or key is not query or value is not query:
                raise ValueError(
                    "a nested query must be key and value too, without masks, got other keys or values, or a mask; pad "
                    "it with query.to_padded_tensor(0)"
                )
            return self._attend_nested(query, need_weights, average_attn_weights)
        check_masks_agree(key_padding_mask, attn_mask, is_causal)
        self._check_impl(need_weights, attn_mask)
        if is_traced(query, key_padding_mask):
            inputs, masks = (query, key, value), (key_padding_mask, attn_mask)
            return self._attend_traced(inputs, masks, need_weights, average_attn_weights, is_causal, self.skip_queries)
        operands, batched = self._operands(query, key, value, key_padding_mask, self.skip_queries)
        # The hint replaces the mask exactly where torch lets it.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask_bhLS = None if attn_mask is None or causal else self._read_mask(attn_mask, query, key, batched)
        operands = self._with_appended_keys(operands)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attend_with_weights(operands, mask_bhLS, dropout_p, average_attn_weights)
        elif causal:
            out = attend_causally(operands, dropout_p)
        elif mask_bhLS is not None:
            out = attend_under_mask(operands, mask_bhLS, dropout_p)
        else:
            out = self._attend(operands, dropout_p)
        result = self._as_caller_has_it(scatter_rows(self.out_proj(out.flatten(1)), operands.queries), batched)
        return result, weights if weights is None or batched else weights[0]

    def readout(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention of at most 16 queries with their weights, e.g. a class token's row without an N × N matrix.

        ``layer.readout(x[:, :1], x, x, mask)`` equals ``layer(x, x, x, mask)`` at the first token (``batch_first``) and
        takes one pass over keys and values. All queries take part, whatever ``skip_queries`` is.

        Args:
            query: (R, B, E), or (B, R, E) if ``batch_first``, or (R, E); 1 ≤ R ≤ 16.
            key, value, key_padding_mask, average_attn_weights: as in :meth:`forward`.

        Returns:
            The output, shaped like ``query``, and the weights before dropout, (B, R, S), or (B, H, R, S) without
            ``average_attn_weights``; there is no B if the inputs have none. Both are differentiable.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit.
        """
        if is_traced(query, key_padding_mask):
            inputs, masks = (query, key, value), (key_padding_mask, None)
            out, weights = self._attend_traced(inputs, masks, True, average_attn_weights, False, False)
            return out, cast(Tensor, weights)
        operands, batched = self._operands(query, key, value, key_padding_mask, False)
        operands = self._with_appended_keys(operands)
        q_BRHD = scatter_rows(operands.q, operands.queries)
        keys, bias = operands.keys, operands.key_bias
        out, rows_RHT = cast(
            tuple[Tensor, Tensor],
            readout(
                q_BRHD,
                operands.k,
                operands.v,
                keys.cu_seqlens,
                keys.max_seqlen,
                key_bias=bias,
                dropout_p=self.dropout if self.training else 0.0,
                return_rows=True,
                impl=self.impl,
            ),
        )
        weights = scatter_rows(rows_RHT.permute(2, 1, 0), keys).permute(0, 2, 3, 1)  # [B, H, R, S]
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return self._as_caller_has_it(self.out_proj(out.flatten(2)), batched), weights if batched else weights[0]

    def _attend(self, operands: Operands, dropout_p: float) -> Tensor:
        """Run the fused operation, or torch's where that has the faster dropout; returns (Tq, H, D)."""
        if dropout_p > 0 and self.impl is None and dropout_is_torchs(operands):
            return attend_under_mask(operands, None, dropout_p)
        everything_dropped = dropout_p == 1
        out = cast(
            Tensor,
            packed_attention(
                operands.q,
                operands.k,
                operands.v,
                *operands.lengths,
                key_bias=operands.key_bias,
                dropout_p=0.0 if everything_dropped else dropout_p,
                impl=self.impl,
            ),
        )
        return 0 * out if everything_dropped else out

    def _attend_nested(self, query: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        self._check_impl(need_weights, None)
        rows, packing = nested_rows(query)
        operands = self._with_appended_keys(Operands(*project(self, rows, rows, rows), packing, packing, None))
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attend_with_weights(operands, None, dropout_p, average)
        else:
            out = self._attend(operands, dropout_p)
        return nested_like(self.out_proj(out.flatten(1)), query, packing), weights

    def _attend_traced(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        masks: tuple[Tensor | None, Tensor | None],
        need_weights: bool,
        average: bool,
        is_causal: bool,
        skip_queries: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute :meth:`forward` over all tokens; see :mod:`maskattn.nn.traced_attention`."""
        if not is_jit_traced():  # torch.jit.trace would warn of every comparison
            check_inputs(self, *inputs)
        batched = inputs[0].ndim == 3
        dense = {id(x): self._batch_first(x, batched) for x in inputs}
        query, key, value = (dense[id(x)] for x in inputs)
        padding = (None, None) if masks[0] is None else _split_padding_mask(masks[0], key, batched)
        causal = is_causal and masks[0] is None and not need_weights
        mask_bhLS = None if masks[1] is None or causal else self._read_mask(masks[1], inputs[0], inputs[1], batched)
        options = {"skip_queries": skip_queries, "causal": causal, "need_weights": need_weights}
        out, weights = attend_to_all_tokens(
            self, (query, key, value), padding, mask_bhLS, self._appended_keys(), **options
        )
        if weights is not None:
            weights = weights.mean(dim=1) if average else weights
            weights = weights if batched else weights[0]
        return self._as_caller_has_it(out, batched), weights

    def _operands(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, skip_queries: bool
    ) -> tuple[Operands, bool]:
        """Return the projected rows of the tokens that take part, and whether the inputs are batched."""
        batched = query.ndim == 3
        check_inputs(self, query, key, value)
        is_self, key_is_value = query is key, key is value
        query, key = self._batch_first(query, batched), self._batch_first(key, batched)
        value = key if key_is_value else self._batch_first(value, batched)
        if skip_queries and query.shape[1] != key.shape[1]:
            raise ValueError(
                "skip_queries=True reads key_padding_mask for the queries too, so both must have one length, got "
                f"{query.shape[1]} queries and {key.shape[1]} keys; use skip_queries=False for cross-attention"
            )
        keys, key_bias = _read_padding_mask(key_padding_mask, key, batched)
        same_rows = skip_queries or (is_self and is_full(keys))
        queries = keys if same_rows else every_token(query.shape[0], query.shape[1], query.device)
        rows_k = rows_of(key, keys)
        rows_v = rows_k if key_is_value else rows_of(value, keys)
        rows_q = rows_k if is_self and same_rows else rows_of(query, queries)
        return Operands(*project(self, rows_q, rows_k, rows_v), queries, keys, key_bias), batched

    def _appended_keys(self) -> list[tuple[Tensor, Tensor]]:
        """Return the key and value that ``add_bias_kv`` learns and the zeros of ``add_zero_attn``, (1, H, D) each."""
        shape, more = (1, self.num_heads, self.head_dim), []
        if self.bias_k is not None and self.bias_v is not None:
            more.append((self.bias_k.view(shape), self.bias_v.view(shape)))
        if self.add_zero_attn:
            zero = self.out_proj.weight.new_zeros(shape)
            more.append((zero, zero))
        return more

    def _with_appended_keys(self, operands: Operands) -> Operands:
        """Return the operands with the appended keys at the end of every sequence."""
        for k, v in self._appended_keys():
            operands = operands.with_keys_appended(k, v)
        return operands

    def _read_mask(self, mask: Tensor, query: Tensor, key: Tensor, batched: bool) -> Tensor:
        """Convert torch's ``attn_mask`` to (b, h, L, S), −inf where a query ignores a key, with 0 for appended keys."""
        first = batched and self.batch_first
        B, H = query.shape[0 if first else 1] if batched else 1, self.num_heads
        plain = (query.shape[int(first)], key.shape[int(first)])
        if not is_jit_traced() and tuple(mask.shape) not in (plain, (B * H, *plain)):
            raise ValueError(
                f"attn_mask must have shape (L, S) = {plain} or ({'B·H' if batched else 'H'}, L, S) = "
                f"{(B * H, *plain)}, got attn_mask.shape={tuple(mask.shape)}; pass a mask of keys as key_padding_mask"
            )
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
        mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (B, H))
        appended = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(mask, (0, appended)) if appended else mask

    def _check_impl(self, need_weights: bool, attn_mask: Tensor | None) -> None:
        if self.impl in (None, "torch") or not (need_weights or attn_mask is not None):
            return
        lacks = "need_weights=True" if need_weights else "attn_mask"
        raise ValueError(
            f"only impl='torch' supports {lacks}, got impl={self.impl!r}; pass need_weights=False (readout() returns "
            "the rows of a few queries), mask keys with key_padding_mask, or build the layer with impl=None"
        )

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        """Convert an input from the caller's layout to (B, L, E)."""
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _as_caller_has_it(self, x_BLE: Tensor, batched: bool) -> Tensor:
        """Convert (B, L, E) back to the caller's layout; contiguous, as callers who use ``view`` expect."""
        if not batched:
            return x_BLE[0]
        return x_BLE if self.batch_first else x_BLE.transpose(0, 1).contiguous()


def _announce_forward(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Do nothing: ``nn.TransformerEncoderLayer`` calls a layer that has a hook, instead of reading its weights."""


def _read_padding_mask(mask: Tensor | None, key: Tensor, batched: bool) -> tuple[Packing, Tensor | None]:
    """Convert PyTorch's mask to the packing of the kept keys and the bias (Tk,) of a float mask, if any."""
    if mask is None:
        return every_token(key.shape[0], key.shape[1], key.device), None
    keep_BS, bias_BS = _split_padding_mask(mask, key, batched)
    if bias_BS is None:
        return Packing.from_keep(keep_BS), None
    if mask.requires_grad:
        keys, is_biased = Packing.from_keep(keep_BS), True
    else:
        # nn.TransformerEncoder turns bool masks into floats of 0 and −inf.
        keys, is_biased = packing_and_answer(keep_BS, ((bias_BS != 0) & keep_BS).any())
    return keys, rows_of(bias_BS, keys) if is_biased else None


def _split_padding_mask(mask: Tensor, key: Tensor, batched: bool) -> tuple[Tensor, Tensor | None]:
    """Convert PyTorch's mask (True or −inf = ignore) to ``keep`` (B, S) and the bias (B, S) of a float mask."""
    wanted = tuple(key.shape[:2] if batched else key.shape[1:2])
    if not is_jit_traced() and tuple(mask.shape) != wanted:
        raise ValueError(
            f"key_padding_mask must have shape {'(B, S)' if batched else '(S,)'} = {wanted}, got "
            f"key_padding_mask.shape={tuple(mask.shape)}; it is (B, S) whatever batch_first is"
        )
    mask_BS = mask if batched else mask[None]
    if mask.dtype == torch.bool:
        return ~mask_BS, None
    # A NaN in the mask is kept, so that it shows in the output instead of hiding a mistake.
    return ~(mask_BS <= torch.finfo(mask.dtype).min), mask_BS

"""Attention over all tokens, for programs that are traced or exported and for tensors without values.

Packing reads the mask: the number of kept tokens is data, which ``torch.jit.trace`` would freeze, which does not exist
on the meta device, and which differs between the samples of ``torch.vmap`` over masks. Here the mask stays an input of
the program, and every operation is torch's own, so that an exported program runs without this package. Masked keys cost
as much as kept ones, but are set to 0 before anything reads them:

    P = softmax(s·QKᵀ + added)      out = dropout(P) V

Dimension key: B sequences, L queries and S keys of each, H heads (h is 1 or H, b is 1 or B), D head width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn.multihead_inputs import project
from maskattn.packing import is_jit_traced
from maskattn.shapes import Bool, Float
from maskattn.transforms import is_mapped

__all__ = ["attend_to_all_tokens", "is_traced"]


def is_traced(x: Tensor, mask: Tensor | None = None) -> bool:
    """Return whether the call is traced or exported, or x or the mask has no values of its own (meta, vmap)."""
    if is_jit_traced() or torch.compiler.is_exporting() or x.device.type == "meta":
        return True
    return mask is not None and is_mapped(mask)


def attend_to_all_tokens(
    layer: nn.MultiheadAttention,
    inputs: tuple[Tensor, Tensor, Tensor],
    padding: tuple[Tensor | None, Tensor | None],
    mask_bhLS: Float[Tensor, "b h L S"] | None,
    appended: Sequence[tuple[Tensor, Tensor]],
    *,
    skip_queries: bool,
    causal: bool,
    need_weights: bool,
) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B H L S"] | None]:
    """Compute a layer's output, and the attention weights if they are wanted.

    Args:
        layer: the layer, for its projections, heads and dropout.
        inputs: query (B, L, C), key and value (B, S, ·).
        padding: the keys that take part (B, S) bool, None for all, and their biases (B, S), None for none.
        mask_bhLS: the mask that is added to the scores, or None; it includes a column for each appended key.
        appended: the keys and values (1, H, D) that are added at the end of every sequence.
        skip_queries: tokens that are not keys are not queries either.
        causal: query i attends to keys 0 … i; excludes padding, mask and weights.
        need_weights: return the weights.

    Returns:
        The output, and the weights after dropout or None.
    """
    keep_BS = padding[0]
    query, key, value = inputs
    is_self, key_is_value = query is key, key is value
    key = blanked(key, keep_BS)
    value = key if key_is_value else blanked(value, keep_BS)
    if skip_queries:
        query = key if is_self else blanked(query, keep_BS)
    B = query.shape[0]
    rows_k = key.flatten(0, 1)
    rows_v = rows_k if key is value else value.flatten(0, 1)
    projected = project(layer, rows_k if query is key else query.flatten(0, 1), rows_k, rows_v)
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in projected)  # [B, H, L or S, D]
    for more_k, more_v in appended:
        k, v = (
            torch.cat([x, more.to(x).view(1, -1, 1, x.shape[-1]).expand(B, -1, -1, -1)], 2)
            for x, more in ((k, more_k), (v, more_v))
        )
    added = _added(q, padding, mask_bhLS, len(appended))
    dropout_p = layer.dropout if layer.training else 0.0
    if causal:
        out, weights = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True), None
    else:
        out, weights = _attend(q, k, v, added, dropout_p, need_weights)
    result = layer.out_proj(out.transpose(1, 2).flatten(2))
    if skip_queries and keep_BS is not None:
        result = blanked(result, keep_BS)
        weights = None if weights is None else weights.masked_fill(~keep_BS[:, None, :, None], 0)
    return result, weights


def blanked(x_BSC: Float[Tensor, "B S C"], keep_BS: Bool[Tensor, "B S"] | None) -> Float[Tensor, "B S C"]:
    """Set tokens that take no part to 0, so that NaN in them reaches neither an output nor a gradient."""
    return x_BSC if keep_BS is None else x_BSC.masked_fill(~keep_BS[:, :, None], 0)


def _added(
    q: Tensor, padding: tuple[Tensor | None, Tensor | None], mask_bhLS: Tensor | None, num_appended: int
) -> Float[Tensor, "b h L S"] | None:
    """Return the term that is added to the scores: −inf for keys that take no part, the biases and the mask."""
    keep_BS, bias_BS = padding
    added = None if mask_bhLS is None else mask_bhLS.to(q.dtype)
    if keep_BS is None:
        return added
    of_keys = torch.zeros_like(keep_BS, dtype=q.dtype) if bias_BS is None else bias_BS.to(q.dtype)
    of_keys = F.pad(of_keys.masked_fill(~keep_BS, float("-inf")), (0, num_appended))[:, None, None, :]
    return of_keys if added is None else added + of_keys


def _attend(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, dropout_p: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute attention; the output and the weights of a query without a key are 0."""
    without_key = None
    if added is not None:
        without_key = added.detach().isneginf().all(dim=-1, keepdim=True)
        added = added.masked_fill(without_key, 0)
    if not need_weights:
        out, weights = F.scaled_dot_product_attention(q, k, v, added, dropout_p), None
    else:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = (scores if added is None else scores + added).softmax(dim=-1)
        weights = F.dropout(weights if without_key is None else weights.masked_fill(without_key, 0), dropout_p)
        out = weights @ v
    return out if without_key is None else out.masked_fill(without_key, 0), weights

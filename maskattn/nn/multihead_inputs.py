"""Checks and projections of the inputs of a multi-head attention layer, with the weights of torch's layer.

Dimension key: Tq and Tk packed queries and keys, E channels, H heads, D head width.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["check_inputs", "check_masks_agree", "project"]


def project(layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project packed rows (T, E) to q (Tq, H, D), k and v (Tk, H, D); inputs that are one tensor share one product."""
    weight, E, H = layer.in_proj_weight, layer.embed_dim, layer.num_heads
    dtype = (layer.q_proj_weight if weight is None else weight).dtype
    # A layer may store its biases in another dtype than its weights, and F.linear takes one dtype.
    bias = None if layer.in_proj_bias is None else layer.in_proj_bias.to(dtype)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if weight is None:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    elif key is not value:
        weights = weight.chunk(3)
    elif query is key:
        q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, H, -1)).unbind(1)
        return q, k, v
    else:
        q = F.linear(query, weight[:E], biases[0]).unflatten(-1, (H, -1))
        k, v = F.linear(key, weight[E:], None if bias is None else bias[E:]).unflatten(-1, (2, H, -1)).unbind(1)
        return q, k, v
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (H, -1)) for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    return q, k, v


def check_inputs(layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that query, key and value fit the layer and each other.

    Raises:
        ValueError: they do not.
    """
    if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            "query, key and value must all be batched (3 dimensions) or all unbatched (2), got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; add the batch with x[None]"
        )
    batch = None if query.ndim == 2 else 0 if layer.batch_first else 1
    wanted = (query.shape[-1], layer.embed_dim), (key.shape[-1], layer.kdim), (value.shape[-1], layer.vdim)
    one_batch = batch is None or query.shape[batch] == key.shape[batch]
    if any(got != width for got, width in wanted) or key.shape[:-1] != value.shape[:-1] or not one_batch:
        raise ValueError(
            f"query, key and value must have {layer.embed_dim}, {layer.kdim} and {layer.vdim} channels, one batch, "
            f"and as many keys as values, got shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)} with batch_first={layer.batch_first}"
        )


def check_masks_agree(key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise and warn as torch's layer does, as far as dtypes and the arguments given decide it."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise TypeError(
                f"{name} must be bool (True = ignore) or float (added to the scores), got {name}.dtype={mask.dtype}; "
                f"convert it with {name}.bool()"
            )
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal is a hint about attn_mask, got is_causal=True without attn_mask; pass the mask too, "
            "e.g. nn.Transformer.generate_square_subsequent_mask(L). Need attn_mask if specifying the is_causal hint."
        )
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=6,  # past the check, forward and the three frames of Module.__call__
        )

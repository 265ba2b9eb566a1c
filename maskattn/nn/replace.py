"""Replacement of torch's attention layers in an existing model."""

from __future__ import annotations

import warnings
from typing import TypeVar, cast

from torch import nn

from maskattn.nn.multihead import MultiheadAttention

__all__ = ["replace_attention"]

Model = TypeVar("Model", bound=nn.Module)


def replace_attention(model: Model, *, skip_queries: bool = False, impl: str | None = None) -> Model:
    """Turn every ``torch.nn.MultiheadAttention`` of a model into a ``maskattn.nn.MultiheadAttention``, in place.

    Only the class of the module objects changes, so that parameters, buffers, hooks, training mode, device, dtype,
    sharing and an optimizer's references are untouched. Layers that are already this package's are left unchanged, and
    so, with a warning, are subclasses of torch's layer, whose forward may differ.

    Args:
        model: any module: an attention layer, or one that contains some.
        skip_queries, impl: as in :class:`maskattn.nn.MultiheadAttention`, for all layers. ``skip_queries`` is for
            models whose layers are all self-attention.

    Returns:
        ``model``.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2)
        >>> type(replace_attention(encoder).layers[0].self_attn)
        <class 'maskattn.nn.multihead.MultiheadAttention'>
    """
    unknown = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
            cast(MultiheadAttention, module)._set_masking(skip_queries, impl)
        elif isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention):
            unknown.append(f"{name or 'the model itself'} ({type(module).__name__})")
    if unknown:
        warnings.warn(
            f"replace_attention replaces only torch.nn.MultiheadAttention itself and left these subclasses unchanged: "
            f"{', '.join(unknown)}",
            stacklevel=2,
        )
    return model

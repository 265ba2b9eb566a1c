"""Swap torch's attention layers for ours in a model that exists."""

from __future__ import annotations

import warnings
from typing import TypeVar, cast

from torch import nn

from maskattn.nn.multihead import MultiheadAttention

__all__ = ["replace_attention"]

Model = TypeVar("Model", bound=nn.Module)


def replace_attention(model: Model, *, skip_queries: bool = False, impl: str | None = None) -> Model:
    """Turn every ``torch.nn.MultiheadAttention`` of a model into a ``maskattn.nn.MultiheadAttention``, in place.

    The module objects stay and only change their class, so that parameters, buffers, hooks, training mode, device,
    dtype, sharing and whatever an optimizer holds are untouched. Layers that are ours already are left as they are,
    and so are subclasses of torch's layer, with a warning: their forward may be another.

    Args:
        model: any module, itself an attention layer or holding some.
        skip_queries, impl: as :class:`maskattn.nn.MultiheadAttention` has them, for all layers. ``skip_queries`` is for
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
            f"replace_attention swaps torch.nn.MultiheadAttention alone and left its subclasses as they are: "
            f"{', '.join(unknown)}",
            stacklevel=2,
        )
    return model

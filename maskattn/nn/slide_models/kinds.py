"""The kinds of slide heads, and the construction of a head from a model folder's configuration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from maskattn.nn.slide_models.head import SlideHead

__all__ = ["HEADS", "head_of_kind"]

HEADS = {
    "pooled": "pooling.PooledHead",
    "gated_attention": "gated_attention.GatedAttentionHead",
    "best_instance": "best_instance.BestInstanceHead",
    "transmil": "transmil.TransMILHead",
    "vit": "vit.ViTHead",
    "stamp_alibi": "stamp.DistanceViTHead",
    "titan": "titan.TitanHead",
    "gigapath": "gigapath.GigaPathHead",
    "hipt": "hipt.HIPTHead",
    "zero_shot": "zero_shot.ZeroShotHead",
    "ordinal": "ordinal.OrdinalHead",
}
"""Kind → module and class of its head."""

_WITH_IMPL = ("vit", "titan", "gigapath", "hipt", "ordinal")


def head_of_kind(kind: str, arguments: Mapping[str, Any], impl: str | None = None) -> SlideHead:
    """Build a head.

    Args:
        kind: a key of :data:`HEADS`.
        arguments: the result of :meth:`SlideHead.arguments`.
        impl: implementation of the attention, for kinds that take one; None takes the best.

    Raises:
        TypeError: the arguments do not match the head's.
    """
    module, _, name = HEADS[kind].partition(".")
    built = getattr(importlib.import_module(f"maskattn.nn.slide_models.{module}"), name)
    head: SlideHead = built(**arguments, **({"impl": impl} if kind in _WITH_IMPL else {}))
    return head

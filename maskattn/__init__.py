"""Fused token-masked attention for vision transformers: background costs nothing and counts for nothing.

The public names are imported when they are first used, so that what needs no torch (``maskattn info``) does not wait
for it. ``import maskattn.attention`` registers the operations with ``torch.library`` at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskattn.attention import masked_attention, packed_attention, readout, token_relevance
    from maskattn.packing import Packing, pack, unpack

__version__ = "0.1.0"

__all__ = [
    "Packing",
    "masked_attention",
    "pack",
    "packed_attention",
    "readout",
    "token_relevance",
    "unpack",
    "__version__",
]

_HOME = {
    **dict.fromkeys(("masked_attention", "packed_attention", "readout", "token_relevance"), "maskattn.attention"),
    **dict.fromkeys(("Packing", "pack", "unpack"), "maskattn.packing"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

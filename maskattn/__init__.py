"""Fused token-masked attention for vision transformers: background costs nothing and counts for nothing.

The public names are imported when they are first used, so that what needs no torch (``maskattn info``) does not wait
for it. ``import maskattn.attention`` registers the operations with ``torch.library`` at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskattn.first_use import imported_on_first_use

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
    **dict.fromkeys(("masked_attention", "packed_attention", "readout", "token_relevance"), "attention"),
    **dict.fromkeys(("Packing", "pack", "unpack"), "packing"),
}

__getattr__, __dir__ = imported_on_first_use(__name__, _HOME)

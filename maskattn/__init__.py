"""Fused token-masked attention for vision transformers: background tokens cost nothing and have no effect.

The public names are imported on first use, so that commands without torch (``maskattn info``) do not wait for its
import. ``import maskattn.attention`` registers the operations with ``torch.library`` immediately.
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

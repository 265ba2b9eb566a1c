"""Fused token-masked attention for vision transformers: background costs nothing and counts for nothing."""

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

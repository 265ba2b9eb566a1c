"""Conversion of other libraries' models into packed ones with the same outputs."""

from maskattn.nn.adapters.timm import from_timm
from maskattn.nn.adapters.transformers import from_transformers, register_attention

__all__ = ["from_timm", "from_transformers", "register_attention"]
